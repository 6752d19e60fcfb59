"""What the records of the model say of themselves."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from backupd.core.model import Digest, Fingerprint, fingerprint_of, is_same_file, is_unchanged


def test_a_digest_is_read_back_from_how_it_is_written() -> None:
    digest = Digest("sha256", "ab" * 32)
    assert str(digest) == f"sha256:{'ab' * 32}"
    assert Digest.parse(str(digest)) == digest


def test_a_fingerprint_is_what_fstat_tells(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    status = os.stat(path)
    assert fingerprint_of(status) == Fingerprint(
        status.st_dev, status.st_ino, 3, status.st_mtime_ns, status.st_ctime_ns
    )


def test_a_file_is_the_same_after_a_rename_and_unchanged_whatever_its_device_is_called(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    status = os.stat(path)
    looks = replace(fingerprint_of(status), device=status.st_dev + 1)
    assert is_unchanged(status, looks)
    assert not is_unchanged(status, replace(looks, ctime_ns=1))
    assert is_same_file(status, replace(looks, ctime_ns=1))
    for other in (replace(looks, inode=1), replace(looks, size=4), replace(looks, mtime_ns=1)):
        assert not is_unchanged(status, other)
        assert not is_same_file(status, other)
