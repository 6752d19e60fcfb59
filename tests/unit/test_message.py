"""The messages of log lines: templates of the catalogue, filled with the values of keys."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.telemetry.events import CATALOGUE, Event
from backupd.telemetry.message import keys_of, render, required_keys


@pytest.mark.parametrize(
    ("template", "values", "message"),
    [
        ("{archive} is {disposition}", {"archive": "r1.cfg", "disposition": "kept"}, "r1.cfg is kept"),
        (
            "{archive} was moved[ to {moved_to}]",
            {"archive": "a", "moved_to": "sent/a"},
            "a was moved to sent/a",
        ),
        ("{archive} was moved[ to {moved_to}]", {"archive": "a"}, "a was moved"),
        ("{drop}[ of {device} and {reason}] is late", {"drop": "d", "device": "x"}, "d is late"),
        ("[{device}, ]{drop}", {"drop": "d", "device": ""}, "d"),
        ("changed[: {drops_changed}]", {"drops_changed": []}, "changed"),
        ("changed[: {drops_changed}]", {"drops_changed": ["a", "b"]}, "changed: a, b"),
        (
            "{pending} pending[, {in_flight} uploading]",
            {"pending": 0, "in_flight": 0},
            "0 pending",
        ),
        ("{archive}[, {days_left}]", {"archive": "a", "days_left": 0}, "a, 0 days left"),
        ("{archive}: {error}", {"archive": "a"}, "a: ?"),
    ],
)
def test_a_template_is_filled_with_the_values_of_keys(
    template: str, values: dict[str, object], message: str
) -> None:
    assert render(template, values) == message


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("duration_s", 0.04, "0 s"),
        ("duration_s", 0.35, "0.3 s"),
        ("duration_s", 2.0, "2 s"),
        ("down_for_s", 59.9, "59 s"),
        ("paused_for_s", 3661.5, "1 h 1 min"),
        ("step_s", -7200.0, "-2 h"),
        ("step_s", -3.5, "-3.5 s"),
        ("bytes_per_s", 1500, "1500"),
        ("size_bytes", 1500, "1.5 KiB"),
        ("free_bytes", 0, "0 B"),
        ("days_left", 1, "1 day left"),
        ("days_left", 30, "30 days left"),
        ("days_left", -1, "expired"),
        ("days_left", -3, "expired 3 days ago"),
        ("error", "two\n  lines", "two; lines"),
        ("error", "a.toml can't be used:\nlog: 1\ndrop: 2", "a.toml can't be used: log: 1; drop: 2"),
        ("error", "it can't", "it can't"),
        ("duration_s", "soon", "soon"),
        ("size_bytes", "large", "large"),
    ],
)
def test_values_are_shown_in_units_for_people(key: str, value: object, text: str) -> None:
    assert render(f"{{{key}}}", {key: value}) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("core-1/r1.cfg", "core-1/r1.cfg"),
        ("r 1.cfg", '"r 1.cfg"'),
        ('r"1.cfg', '"r\\"1.cfg"'),
        ("it's.cfg", '"it\'s.cfg"'),
        ("r1\\", "r1\\"),
        ('r1\\" b', '"r1\\\\\\" b"'),
        ("r1\nr2", '"r1\\nr2"'),
        ("\u202egfc.1r", "\\u202egfc.1r"),
        ("r1\\xff.cfg", "r1\\xff.cfg"),
        ("", '""'),
    ],
)
@pytest.mark.parametrize("key", ["archive", "path", "moved_to", "device", "config"])
def test_a_file_name_is_quoted_if_its_end_would_be_unclear(key: str, name: str, text: str) -> None:
    assert render(f"{{{key}}}.", {key: name}) == f"{text}."


@pytest.mark.parametrize(
    "name", ["{error}", "{archive}", "[", "]", "[{error}]", "{", "}}", "{{error}}", "\\1", "%s"]
)
def test_no_value_is_expanded(name: str) -> None:
    values = {"archive": name, "destination": name, "error": "secret"}
    assert render("{archive} of {destination}", values) == f"{name} of {name}"


@given(st.text(), st.text())
def test_a_message_is_one_printable_line(name: str, error: str) -> None:
    message = render("{archive} failed: {error}", {"archive": name, "error": error})
    assert message.isprintable()
    assert " failed: " in message


def test_keys_outside_of_brackets_are_required() -> None:
    assert required_keys("{archive}[ to {destination}]: {error}") == {"archive", "error"}
    assert keys_of("{archive}[ to {destination}]: {error}") == {"archive", "destination", "error"}


@pytest.mark.parametrize("event", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_every_message_is_a_sentence_with_all_keys_and_with_the_required_ones(event: Event) -> None:
    whole = render(event.message, dict.fromkeys(event.keys, "x"))
    short = render(event.message, dict.fromkeys(required_keys(event.message), "x"))
    for message in (whole, short):
        assert not re.search(r"[{}\[\]?]|  | [,;:)]|\( | $|^ ", message), message
