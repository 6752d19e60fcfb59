"""The values of an archive for the placeholders of a template."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.names import template_values
from tests.factories import a_fingerprint, an_archive

BUILT_IN = {"name", "stem", "relpath", "drop", "host", "size", "mtime"}


def test_the_built_in_values_come_from_the_archive() -> None:
    fingerprint = a_fingerprint(size=7, mtime_ns=1_772_600_767_890_123_456)
    archive = an_archive(b"site-1/r1.tar.gz", drop="switches", fingerprint=fingerprint)
    assert template_values(archive, "backup-host", None) == {
        "name": "r1.tar.gz",
        "stem": "r1",
        "relpath": "site-1/r1.tar.gz",
        "drop": "switches",
        "host": "backup-host",
        "size": "7",
        "mtime": "2026-03-04T05:06:07Z",
    }


def test_named_groups_of_the_relative_path_become_values() -> None:
    pattern = re.compile(r"(?P<site>[^/]+)/(?P<device>[^/.]+)(?:\.(?P<kind>cfg))?.*")
    values = template_values(an_archive(b"zrh/r1.tar.gz"), "h", pattern)
    assert (values["site"], values["device"], values["kind"]) == ("zrh", "r1", "")


def test_a_pattern_that_does_not_match_the_whole_path_leaves_its_values_empty() -> None:
    assert template_values(an_archive(b"a/b/r1.cfg"), "h", re.compile(r"(?P<site>[^/]+)/[^/]+"))["site"] == ""


def test_a_group_does_not_replace_a_built_in_value() -> None:
    assert (
        template_values(an_archive(b"r1.cfg"), "h", re.compile(r"(?P<name>.)(?P<drop>.*)"))["name"]
        == "r1.cfg"
    )


def test_a_name_that_starts_with_a_dot_is_its_own_stem() -> None:
    assert template_values(an_archive(b".cfg"), "h", None)["stem"] == ".cfg"


@pytest.mark.parametrize(
    ("mtime_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59Z"),
        (10**30, "9999-12-31T23:59:59Z"),
        (-(10**30), "0001-01-01T00:00:00Z"),
    ],
)
def test_every_file_time_has_a_text(mtime_ns: int, text: str) -> None:
    archive = an_archive(fingerprint=a_fingerprint(mtime_ns=mtime_ns))
    assert template_values(archive, "h", None)["mtime"] == text


@given(st.binary(min_size=1), st.integers(-(1 << 90), 1 << 90))
def test_every_value_is_valid_unicode_whatever_the_file_name(relpath: bytes, mtime_ns: int) -> None:
    archive = an_archive(relpath, fingerprint=a_fingerprint(mtime_ns=mtime_ns))
    values = template_values(archive, "h", re.compile(r"(?P<first>.).*", re.DOTALL))
    assert set(values) == BUILT_IN | {"first"}
    for value in values.values():
        assert value.encode("utf-8").decode("utf-8") == value
