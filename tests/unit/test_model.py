"""What the records of the model say of themselves."""

from __future__ import annotations

import os
from pathlib import Path

from backupd.core.model import Digest, Fingerprint, fingerprint_of


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
