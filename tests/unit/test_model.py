"""Digests as text, and fingerprints of files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from backupd.core.model import Digest, Fingerprint, fingerprint_of, is_same_file, is_unchanged


def test_a_digest_is_parsed_from_its_own_text() -> None:
    digest = Digest("sha256", "ab" * 32)
    assert str(digest) == f"sha256:{'ab' * 32}"
    assert Digest.parse(str(digest)) == digest


def test_a_fingerprint_has_the_values_of_stat(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    status = os.stat(path)
    assert fingerprint_of(status) == Fingerprint(status.st_ino, 3, status.st_mtime_ns, status.st_ctime_ns)


def test_a_number_of_a_fingerprint_has_at_most_20_digits() -> None:
    most, time = (1 << 64) - 1, 10**30
    status = os.stat_result([0o100644, most, most, 1, 0, 0, most, 0, 0, 0, *(0.0,) * 3, 0, time, -time])
    fingerprint = fingerprint_of(status)
    assert (fingerprint.inode, fingerprint.size) == (most, most)
    assert (fingerprint.mtime_ns, fingerprint.ctime_ns) == (10**20 - 1, 1 - 10**20)
    assert is_unchanged(status, fingerprint)


def test_a_renamed_file_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    status = os.stat(path)
    fingerprint = fingerprint_of(status)
    assert is_unchanged(status, fingerprint)
    assert not is_unchanged(status, replace(fingerprint, ctime_ns=1))
    assert is_same_file(status, replace(fingerprint, ctime_ns=1))
    for other in (
        replace(fingerprint, inode=1),
        replace(fingerprint, size=4),
        replace(fingerprint, mtime_ns=1),
    ):
        assert not is_unchanged(status, other)
        assert not is_same_file(status, other)
