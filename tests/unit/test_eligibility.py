"""Which files are archives, by name, type and size."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.eligibility import Eligibility, Ineligible, Patterns, is_temporary

REGULAR = stat.S_IFREG | 0o640


def an_eligibility(
    include: tuple[str, ...] = ("*.tar.gz",),
    exclude: tuple[str, ...] = (),
    min_size: int = 1,
    max_size: int | None = None,
) -> Eligibility:
    return Eligibility(Patterns(include), Patterns(exclude), min_size, max_size)


@pytest.mark.parametrize(
    "name",
    [
        b".hidden.tar.gz",
        b".r1.tar.gz.x7Gq2k",  # rsync
        b"r1.tar.gz.filepart",  # WinSCP
        b"r1.tar.gz.part",
        b"r1.tar.gz.aria2",
        b"r1.tar.gz.aria2__temp",  # renamed to the one before, each time that aria2 saves its notes
        b"r1.tar.gz.PARTIAL",
        b"r1.tar.gz.crdownload",
        b"r1.tar.gz.opdownload",  # Opera
        b"r1.tar.gz.cyberduckpart",
        b"r1.tar.gz.part.minio",
        b"r1.tar.gz_.gstmp",  # gcloud storage
        b"r1.cfg.dpkg-new",
        b"r1.cfg~",
        b"~r1.cfg",
        b"#r1.cfg#",
        b".r1.cfg.swp",
        b"r1.tmp",
        b"r1\n.tmp",
        b"\xff.tmp",
    ],
)
def test_names_of_unfinished_files_are_temporary(name: bytes) -> None:
    assert is_temporary(name)


@pytest.mark.parametrize(
    "name", [b"r1.tar.gz", b"part", b"tmp.cfg", b"r1.tmp.gz", b"a#b", b"#a", b"\xff.gz", b"r1.minio"]
)
def test_other_names_are_not_temporary(name: bytes) -> None:
    assert not is_temporary(name)


def test_a_pattern_without_a_slash_matches_the_base_name() -> None:
    patterns = Patterns(("*.cfg",))
    assert patterns.match(b"r1.cfg")
    assert patterns.match(b"site/r1.cfg")
    assert not patterns.match(b"r1.cfg/readme")


def test_a_pattern_with_a_slash_matches_the_relative_path() -> None:
    patterns = Patterns(("site-?/*.cfg",))
    assert patterns.match(b"site-1/r1.cfg")
    assert not patterns.match(b"r1.cfg")
    assert not patterns.match(b"old/site-1/r1.cfg")


def test_patterns_are_case_insensitive() -> None:
    assert Patterns(("*.TAR.gz",)).match(b"R1.tar.GZ")


def test_a_name_that_is_not_utf8_can_match() -> None:
    assert Patterns(("*.gz",)).match(b"\xff\xfe\n.gz")


def test_without_patterns_nothing_matches() -> None:
    assert not Patterns(()).match(b"r1.cfg")


@given(st.binary(min_size=1).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_an_asterisk_matches_every_name(name: bytes) -> None:
    assert Patterns(("*",)).match(name)


@pytest.mark.parametrize(
    ("relpath", "reason"),
    [
        (b"r1.tar.gz", None),
        (b"site/r1.tar.gz", None),
        (b"site/.r1.tar.gz", Ineligible.TEMPORARY),
        (b"r1.old.tar.gz", Ineligible.EXCLUDED),
        (b"readme.pdf", Ineligible.NOT_INCLUDED),
    ],
)
def test_a_name_is_eligible_or_has_a_reason_why_not(relpath: bytes, reason: Ineligible | None) -> None:
    assert an_eligibility(exclude=("*.old.*",)).of_name(relpath) is reason


def test_exclude_wins_over_include() -> None:
    assert an_eligibility(include=("*",), exclude=("*.tar.gz",)).of_name(b"r1.tar.gz") is Ineligible.EXCLUDED


@pytest.mark.parametrize(
    ("mode", "size", "reason"),
    [
        (REGULAR, 10, None),
        (REGULAR, 20, None),
        (REGULAR, 9, Ineligible.TOO_SMALL),
        (REGULAR, 21, Ineligible.TOO_LARGE),
        (stat.S_IFLNK | 0o777, 15, Ineligible.SYMLINK),
        (stat.S_IFIFO | 0o640, 15, Ineligible.SPECIAL),
        (stat.S_IFSOCK | 0o640, 15, Ineligible.SPECIAL),
        (stat.S_IFDIR | 0o750, 15, Ineligible.SPECIAL),
    ],
)
def test_type_and_size_are_eligible_or_have_a_reason_why_not(
    mode: int, size: int, reason: Ineligible | None
) -> None:
    assert an_eligibility(min_size=10, max_size=20).of_file(mode, size) is reason


def test_without_a_limit_no_file_is_too_large() -> None:
    assert an_eligibility().of_file(REGULAR, 1 << 62) is None
