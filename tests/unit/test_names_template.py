"""Texts with placeholders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.names import TemplateError, TextTemplate

NAMES = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True)


def test_placeholders_are_filled_in() -> None:
    template = TextTemplate.parse("Config backup {name} of {drop}, {name}")
    assert template.names == {"name", "drop"}
    assert template.render({"name": "a.tgz", "drop": "switches"}) == "Config backup a.tgz of switches, a.tgz"


def test_only_values_are_escaped() -> None:
    assert TextTemplate.parse("a b/{name}").render(
        {"name": "c d"}, lambda value: value.replace(" ", "%20")
    ) == ("a b/c%20d")


def test_a_value_is_inserted_as_it_is() -> None:
    assert TextTemplate.parse("{name}").render({"name": "{drop}"}) == "{drop}"


def test_a_placeholder_without_a_value_is_an_error() -> None:
    with pytest.raises(KeyError):
        TextTemplate.parse("{name}").render({})


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{{name}}", "{name}"),
        ("{{{name}}}", "{x}"),
        ("{{}}", "{}"),
        ("{name}}}", "x}"),
        ("two\nlines {name}", "two\nlines x"),
    ],
)
def test_doubled_braces_are_single_ones(text: str, rendered: str) -> None:
    assert TextTemplate.parse(text).render({"name": "x"}) == rendered


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", 'unmatched "{" at character 1; write "{{" and "}}" for braces'),
        ("a}", 'unmatched "}" at character 2'),
        ("{name}}", 'unmatched "}" at character 7'),
        ("{a{b}", 'unmatched "{" at character 1'),
        ("{}", 'expected a plain name in the braces at character 1, such as "{name}"'),
        ("x{name.upper}", "expected a plain name in the braces at character 2"),
        ("{name!r}", "expected a plain name"),
        ("{name:>9}", "expected a plain name"),
        ("{name[0]}", "expected a plain name"),
        ("{ name }", "expected a plain name"),
        ("{0}", "expected a plain name"),
    ],
)
def test_anything_but_a_plain_name_in_braces_is_refused(text: str, message: str) -> None:
    with pytest.raises(TemplateError) as refusal:
        TextTemplate.parse(text)
    assert str(refusal.value).startswith(message)


@given(st.text())
def test_any_text_can_be_written_with_doubled_braces(text: str) -> None:
    template = TextTemplate.parse(text.replace("{", "{{").replace("}", "}}"))
    assert template.names == frozenset()
    assert template.render({}) == text


@given(NAMES, st.text(), st.text(alphabet="ab /"))
def test_a_rendered_text_contains_the_value(name: str, value: str, around: str) -> None:
    assert TextTemplate.parse(f"{around}{{{name}}}{around}").render({name: value}) == around + value + around


@given(st.text(alphabet="{}ab. "))
def test_every_text_is_parsed_or_refused(text: str) -> None:
    try:
        template = TextTemplate.parse(text)
    except TemplateError:
        return
    assert len(template.render(dict.fromkeys(template.names, ""))) <= len(text)
