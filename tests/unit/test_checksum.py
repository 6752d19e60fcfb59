"""Checksum files: their names, and the formats in which tools write them."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.checksum import (
    archive_name_of,
    checksum_file_names,
    digest_in_list,
    digest_in_single,
    is_checksum_name,
)
from backupd.core.model import Digest

HEX = {name: hashlib.new(name, b"abc").hexdigest() for name in ("md5", "sha1", "sha256", "sha512")}
SHA, OTHER = HEX["sha256"].encode(), hashlib.sha256(b"other").hexdigest().encode()


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        (b"r1.tar.gz.sha256", b"r1.tar.gz"),
        (b"r1.tar.gz.SHA256", b"r1.tar.gz"),
        (b"r1.cfg.sha512sum", b"r1.cfg"),
        (b"r1.cfg.md5", b"r1.cfg"),
        (b"r\n1.cfg.sha1", b"r\n1.cfg"),
        (b".sha256", None),
        (b"r1.sha256.gz", None),
        (b"sha256", None),
        (b"r1.cfg", None),
    ],
)
def test_a_checksum_file_is_recognized_by_its_suffix(name: bytes, archive: bytes | None) -> None:
    assert archive_name_of(name) == archive
    assert is_checksum_name(name) == (archive is not None)
    assert archive is None or name in checksum_file_names(archive)


@pytest.mark.parametrize(
    "name", [b"SHA256SUMS", b"sha256sums", b"MD5SUMS", b"sha256sum.txt", b"SHA512SUMS.txt"]
)
def test_a_checksum_file_for_a_directory_is_recognized_by_its_name(name: bytes) -> None:
    assert is_checksum_name(name)
    assert archive_name_of(name) is None


FORMATS = {
    "coreutils": SHA + b"  r1.tar.gz\n",
    "coreutils, binary": SHA + b" *r1.tar.gz\n",
    "without a line end": SHA + b"  r1.tar.gz",
    "in capitals": SHA.upper() + b"  r1.tar.gz\n",
    "from Windows": SHA + b"  r1.tar.gz\r\n",
    "with a byte order mark": b"\xef\xbb\xbf" + SHA + b"  r1.tar.gz\n",
    "with a tab": SHA + b"\tr1.tar.gz\n",
    "with a directory": SHA + b"  ./backups/r1.tar.gz\n",
    "BSD": b"SHA256 (r1.tar.gz) = " + SHA + b"\n",
    "openssl": b"SHA256(r1.tar.gz)= " + SHA + b"\n",
    "openssl 3": b"SHA2-256(r1.tar.gz)= " + SHA + b"\n",
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_every_format_is_parsed_alone_and_in_a_list(text: bytes) -> None:
    expected = Digest("sha256", HEX["sha256"])
    before, after = OTHER + b"  r0.tar.gz\n# r1.tar.gz\n", b"\n" + OTHER + b"  r2.tar.gz\n"
    in_a_list = before + text.removeprefix(b"\xef\xbb\xbf") + after

    assert digest_in_single(text, b"r1.tar.gz", "sha256") == expected
    assert digest_in_single(in_a_list, b"r1.tar.gz", "sha256") == expected
    assert digest_in_list(in_a_list, b"r1.tar.gz", "sha256") == expected


def test_a_bare_digest_is_parsed_only_in_an_own_checksum_file() -> None:
    assert digest_in_single(SHA + b"\n", b"r1", "sha256") == Digest("sha256", HEX["sha256"])
    assert digest_in_list(SHA + b"\n", b"r1", "sha256") is None


def test_a_single_line_applies_whatever_its_name() -> None:
    assert digest_in_single(SHA + b"  upload-4711.part\n", b"r1", "sha256") == Digest("sha256", HEX["sha256"])


def test_the_last_line_with_a_name_applies() -> None:
    text = OTHER + b"  r1\n" + SHA + b"  r1\n"
    assert digest_in_list(text, b"r1", "sha256") == Digest("sha256", HEX["sha256"])


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b"\\" + SHA + b"  a\\nb\n", b"a\nb"),
        (b"\\" + SHA + b"  a\\\\b\n", b"a\\b"),
        (b"\\" + SHA + b"  a\\rb\n", b"a\rb"),
        (SHA + b"  a\\nb\n", b"a\\nb"),
        (b"\\SHA256 (a\\nb) = " + SHA + b"\n", b"a\nb"),
        (SHA + b"   leading\n", b" leading"),
        (SHA + b"  a (1) = b\n", b"a (1) = b"),
        (b"SHA256 (a) = (b) = " + SHA + b"\n", b"a) = (b"),
        (SHA + b"  \xff\xfe\n", b"\xff\xfe"),
    ],
)
def test_escaped_names_are_unescaped(written: bytes, name: bytes) -> None:
    assert digest_in_list(written, name, "sha256") == Digest("sha256", HEX["sha256"])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n\n",
        SHA[:-1],
        SHA[:40],
        SHA + b"0",
        HEX["md5"].encode() + b"  r1\n",
        b"MD5 (r1) = " + SHA,
        SHA + b"  r0\n" + OTHER + b"  r2\n",
        b"\0" * 100,
        SHA.decode().encode("utf-16"),
        b"g" * 64 + b"  r1\n",
        b"a" * 50 + b"  r1\n",
    ],
)
def test_a_file_without_a_digest_of_the_algorithm_yields_none(text: bytes) -> None:
    assert digest_in_single(text, b"r1", "sha256") is None


@given(st.binary(max_size=300), st.binary(max_size=20))
def test_random_bytes_yield_no_digest_or_one_of_the_right_length(text: bytes, name: bytes) -> None:
    for stated in (digest_in_single(text, name, "md5"), digest_in_list(text, name, "md5")):
        assert stated is None or len(stated.hex) == 32
