"""The memory of the daemon depends neither on the size nor on the number of archives."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from backupd.ledger.sqlite.connection import FILE_NAME, open_ledger
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.stage import TIMEOUT, Stage, a_stage

pytestmark = pytest.mark.long

MIB = 1024 * 1024
BIG = int(os.environ.get("BACKUPD_TEST_BIG", 1024 * MIB))
"""Bytes of the big archive; the file in the drop folder is sparse, the copy of the receiver is not."""


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def peak_of_a_delivery(stage: Stage, size: int) -> int:
    """Deliver a sparse archive of a size; return the peak memory of the daemon in bytes."""
    archive = stage.base / "part"
    with archive.open("wb") as stream:
        stream.write(b"begin")
        stream.truncate(size - 3)
        stream.seek(size - 3)
        stream.write(b"end")
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    try:
        with RunningReceiver(stage.store, tls) as receiver:
            stage.configure(receiver.url, drop='stable_for = "0s"')
            daemon = stage.daemon(before=["env"]).ready()  # with its own imports alone
            archive.rename(stage.drop / "big.tar")
            daemon.wait_for("archive.disposed", timeout=TIMEOUT + size / (2 * MIB))
            peak = daemon.memory("VmHWM")
            assert daemon.stop() == 0
        record = json.loads((stage.sent / "big.tar.receipt.json").read_bytes())
        [stored] = stage.stored()
        assert stored.stat().st_size == record["size"] == size
        assert record["digest"] == f"sha256:{sha256(stored)}"
        assert json.loads(record["deliveries"][0]["receipt"])["sha256"] == sha256(stage.sent / "big.tar")
        assert not daemon.events("attempt.failed")
    finally:
        for path in (archive, *stage.stored(), *stage.archives(stage.drop)):
            path.unlink(missing_ok=True)
    return peak


def test_a_big_archive_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    peaks = []
    for number, size in enumerate((MIB, BIG)):
        (tmp_path / str(number)).mkdir()
        with contextlib.contextmanager(a_stage)(tmp_path / str(number)) as stage:
            peaks.append(peak_of_a_delivery(stage, size))
    small, big = peaks
    print(f"peak {small / MIB:.1f} MiB for {MIB} bytes, {big / MIB:.1f} MiB for {BIG}")
    assert big - small < 8 * MIB
    assert max(peaks) <= 80 * MIB


def add_history(stage: Stage, archives: int) -> None:
    """Add archives to the ledger and to `sent` as if they had been delivered."""
    stage.sent.mkdir()
    for number in range(1, archives + 1):
        (stage.sent / f"switch-{number:06}.tar.gz").touch()
    stage.state.mkdir()
    db = open_ledger(stage.state).connection
    began = time.time_ns() // 1000 - archives
    db.executescript(
        f"""
        BEGIN;
        WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {archives})
        INSERT INTO archive (drop_name, relpath, folder_id, inode, size, mtime_ns, ctime_ns, queued_at,
            state, digest, disposition, moved_to, disposed_at, has_entry)
        SELECT 'switches', CAST(printf('switch-%06d.tar.gz', n) AS BLOB), 1, n, 1000, 0, 0, {began} + n,
            'delivered', 'sha256:' || printf('%064d', n), 'done',
            CAST(printf('sent/switch-%06d.tar.gz', n) AS BLOB), {began} + n, 0
        FROM number;
        INSERT INTO delivery (id, archive_id, destination, size, state, attempts, archive_failures, ended_at,
            digest, verified, http_status, receipt)
        SELECT printf('%036d', id), id, 'vault', size, 'delivered', 1, 1, disposed_at, digest, 1, 201,
            '{{"sha256": "' || substr(digest, 8) || '"}}' FROM archive;
        INSERT INTO attempt (delivery_id, number, started_at, duration_us, sent, outcome)
        SELECT id, 1, ended_at, 1000, size, 'delivered' FROM delivery;
        COMMIT;
        """
    )
    db.close()


def idle(stage: Stage) -> tuple[int, int]:
    """Start and stop a daemon; return its memory, and the bytes that it read until it was ready."""
    stage.configure("https://localhost:1/")
    daemon = stage.daemon(before=["env"]).ready()  # with its own imports alone
    read = daemon.bytes_read()
    resident = daemon.memory("VmRSS")
    assert daemon.stop() == 0
    print(f"ready after {read / MIB:.1f} MiB, idle at {resident / MIB:.1f} MiB")
    return resident, read


def test_memory_and_start_do_not_depend_on_the_number_of_delivered_archives(tmp_path: Path) -> None:
    figures = []
    for number, delivered in enumerate((0, 0, 100_000)):  # the first start may compile the package
        (tmp_path / str(number)).mkdir()
        with contextlib.contextmanager(a_stage)(tmp_path / str(number)) as stage:
            if delivered:
                add_history(stage, delivered)
                assert (stage.state / FILE_NAME).stat().st_size > 32 * MIB
            figures.append(idle(stage))
    _, (small, little), (large, much) = figures
    assert much - little < MIB
    assert large - small < 2 * MIB
    assert large <= 75 * MIB
