"""File names as printable text, and new names for moved files."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from backupd.core.names import NAME_MAX, as_text, free_names, printable, shortened, without_stamp
from tests.factories import NOW

NAMES = st.binary(min_size=1, max_size=NAME_MAX).filter(lambda name: b"/" not in name and b"\0" not in name)
SUFFIXES = st.binary(max_size=60).filter(lambda suffix: b"/" not in suffix)


def is_utf8(name: bytes) -> bool:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@given(st.binary())
@example(b"bad\xff\n.tar.gz")
def test_every_name_becomes_valid_unicode(name: bytes) -> None:
    text = as_text(name)
    assert text.encode("utf-8").decode("utf-8") == text
    assert (text.encode("utf-8") == name) == is_utf8(name)


def test_printable_names_are_unchanged() -> None:
    assert as_text("Zürich-大.cfg".encode()) == "Zürich-大.cfg"
    assert printable("Zürich-大.cfg") == "Zürich-大.cfg"


def test_bytes_that_are_not_utf8_are_escaped() -> None:
    assert as_text(b"bad\xff.cfg") == r"bad\xff.cfg"


@given(st.text())
@example("a\nb\x1b[31m\u202egpj.exe\u2028\x85\udcff")
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode("utf-8") == shown


@given(NAMES, SUFFIXES)
def test_a_shortened_name_is_never_too_long_and_keeps_its_suffix(name: bytes, suffix: bytes) -> None:
    new = shortened(name, suffix)
    assert len(new) <= NAME_MAX
    assert new.endswith(suffix)
    assert new == name + suffix or len(name + suffix) > NAME_MAX


@given(st.binary(min_size=200, max_size=240), NAMES, NAMES, SUFFIXES)
def test_different_names_stay_different(same: bytes, one: bytes, other: bytes, suffix: bytes) -> None:
    one, other = (same + one)[:NAME_MAX], (same + other)[:NAME_MAX]
    assert (shortened(one, suffix) == shortened(other, suffix)) == (one == other)


@given(NAMES)
def test_free_names_start_with_the_name_itself_and_are_distinct_and_short_enough(name: bytes) -> None:
    names = list(itertools.islice(free_names(name, NOW), 30))
    assert names[0] == name
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= NAME_MAX


def test_a_new_name_without_its_stamp_is_the_name_itself() -> None:
    names = itertools.islice(free_names(b"site/r1.cfg", NOW), 30)
    assert {without_stamp(name) for name in names} == {b"site/r1.cfg"}


def test_free_names_append_the_time_and_then_a_number() -> None:
    assert list(itertools.islice(free_names(b"r1.cfg", NOW), 4)) == [
        b"r1.cfg",
        b"r1.cfg.20260304T050607Z",
        b"r1.cfg.20260304T050607Z-2",
        b"r1.cfg.20260304T050607Z-3",
    ]
