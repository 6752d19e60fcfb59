"""The daemon inspects archives and verifies checksum files before any upload."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import os
import signal
import sys
import tarfile
import zlib
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backupd.core.drop_problem import SUSPICIOUS, DropProblem
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.receiver.serve import RunningReceiver
from tests.stage import Daemon, Stage, until

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DELIVER = 'rescan_every = "0.3s"\ninspect_grace = "1s"\n'
SHORT_GRACE = f'{DELIVER}on_suspicious = "reject"\n'
LONG_GRACE = 'rescan_every = "0.3s"\ninspect_grace = "1h"\n'


def a_backup(size: int = 40_000) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        info = tarfile.TarInfo("running.cfg")
        info.size = size
        tar.addfile(info, io.BytesIO(os.urandom(size)))
    return out.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def assert_rejected(stage: Stage, daemon: Daemon, name: str, reason: str) -> None:
    """Assert that an archive was rejected before any request, logged once, and moved to quarantine."""
    daemon.wait_for("archive.disposed", archive=name)
    (event,) = daemon.events("archive.rejected")
    assert (event["archive"], event["reason"]) == (name, reason)
    assert "destination" not in event, "no destination has rejected it"
    assert event["message"].startswith(f"{name} was rejected: ")
    assert not daemon.events("archive.queued")
    assert (stage.rejected / name).exists()
    record = json.loads((stage.rejected / f"{name}.reason.json").read_text())
    assert [one["reason"] for one in record["deliveries"]] == [reason]
    assert stage.stored() == []
    (shown,) = json.loads(stage.backupd("list", "--state", "rejected", "--json").stdout)
    assert json.loads(stage.backupd("show", shown["id"], "--json").stdout)["attempts"] == []


@pytest.mark.long
@pytest.mark.parametrize("restarted", [False, True])
def test_a_truncated_archive_waits_and_is_then_rejected_once(
    stage: Stage, receiver: RunningReceiver, restarted: bool
) -> None:
    drop = 'inspect = "full"\n' + (LONG_GRACE if restarted else SHORT_GRACE)
    stage.configure(receiver.url, drop=drop, top='[log]\nlevel = "debug"')
    if restarted:
        stage.put("r1.tar.gz", a_backup()[:-3000])
        first = stage.daemon().ready()
        first.wait_for("drop.scanned", unfinished_files=1)
        first.kill()
        stage.configure(receiver.url, drop='inspect = "full"\n' + SHORT_GRACE)
    daemon = stage.daemon().ready()
    if not restarted:
        stage.put("r1.tar.gz", a_backup()[:-3000])

    assert_rejected(stage, daemon, "r1.tar.gz", "truncated")

    assert len(daemon.events("archive.waiting")) <= 1
    again = stage.daemon() if daemon.stop() == 0 else daemon
    again.ready()
    stage.put("r2.tar.gz", a_backup())
    again.wait_for("archive.disposed", archive="r2.tar.gz")
    assert not again.events("archive.rejected")
    assert not again.events("watch.degraded")


@pytest.mark.long
def test_a_rejected_archive_can_be_delivered_with_the_retry_command(
    stage: Stage, receiver: RunningReceiver
) -> None:
    content = a_backup()[:-3000]
    stage.configure(receiver.url, drop='inspect = "full"\n' + SHORT_GRACE)
    stage.put("r1.tar.gz", content)
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.rejected")
    daemon.wait_for("archive.disposed")
    assert daemon.stop() == 0
    stage.configure(receiver.url, drop='inspect = "off"')

    assert stage.backupd("retry", "--all").returncode == 0

    stage.daemon().wait_for("archive.delivered", archive="r1.tar.gz")
    assert [path.read_bytes() for path in stage.stored()] == [content]


@pytest.mark.long
@pytest.mark.parametrize("how", ["appended to", "replaced"])
def test_an_archive_that_is_completed_in_time_is_delivered(
    stage: Stage, receiver: RunningReceiver, how: str
) -> None:
    stage.configure(receiver.url, drop='inspect = "full"\n' + 'rescan_every = "0.3s"\n')
    daemon = stage.daemon().ready()
    whole = a_backup()
    stage.put("r1.tar.gz", whole[:-3000])
    (waiting,) = daemon.wait_for("archive.waiting")
    assert (waiting["archive"], waiting["reason"]) == ("r1.tar.gz", "truncated")
    assert daemon.events("archive.queued") == []

    if how == "replaced":
        stage.put("r1.tar.gz", whole)
    else:
        with (stage.drop / "r1.tar.gz").open("ab") as stream:
            stream.write(whole[-3000:])

    daemon.wait_for("archive.disposed")
    assert [path.read_bytes() for path in stage.stored()] == [whole]
    assert not daemon.events("archive.rejected")
    assert not daemon.events("watch.degraded")


def test_a_truncated_archive_is_delivered_and_listed_until_a_whole_one_of_its_name_is_sent(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop=DELIVER, top='heartbeat_every = "1s"')
    daemon = stage.daemon().ready()
    whole = a_backup()
    stage.put("r1.tar.gz", whole[:-3000])

    daemon.wait_for("archive.disposed", archive="r1.tar.gz")
    (suspicious,) = daemon.wait_for("archive.suspicious", archive="r1.tar.gz", reason="truncated")
    assert suspicious["hint"]
    assert [path.read_bytes() for path in stage.stored()] == [whole[:-3000]]
    assert (stage.sent / "r1.tar.gz").exists()
    daemon.wait_for("drop.problem", reason="suspicious", problems=1)
    daemon.kill()
    daemon = stage.daemon().ready()
    daemon.wait_for("drop.problem", reason="suspicious", problems=1)
    check, shown, listed = stage.commands(["status", "--check"], ["status"], ["list", "--problems"])
    assert check.returncode == 1
    assert "1 file of switches: suspicious" in check.stdout
    assert "suspicious" in shown.stdout
    assert "r1.tar.gz" in listed.stdout
    assert "looks truncated: the archive ends in the middle of its gzip data" in listed.stdout

    stage.put("r1.tar.gz", whole)

    daemon.wait_for("drop.problem_solved", reason="suspicious")
    assert stage.backupd("status", "--check").returncode == 0


def test_a_file_that_was_held_back_before_a_restart_has_one_problem_once_it_is_sent(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.state.mkdir()
    with closing(SqliteLedger(open_ledger(stage.state).connection)) as ledger:
        since = datetime.now(UTC) - timedelta(hours=1)
        problem = DropProblem("switches", b"r1.gz", "truncated", since, "it looks cut", "check")
        ledger.save_problems([problem], [])
    stage.put("r1.gz", a_backup()[:-3000])
    stage.configure(receiver.url, drop='rescan_every = "1h"\ninspect_grace = "1s"')
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.suspicious", archive="r1.gz")

    def reasons() -> list[str]:
        return [each["reason"] for each in json.loads(stage.backupd("list", "--problems", "--json").stdout)]

    until(lambda: reasons() == ["suspicious"], "the end of the problem of the earlier run")


@pytest.mark.long
def test_a_suspicious_archive_is_listed_for_a_week(stage: Stage, receiver: RunningReceiver) -> None:
    now = datetime.now(UTC)
    stage.state.mkdir()
    with closing(SqliteLedger(open_ledger(stage.state).connection)) as ledger:
        found = [
            DropProblem("switches", name, SUSPICIOUS, now - timedelta(days=days), "it looks cut", "check")
            for name, days in ((b"old.gz", 8), (b"new.gz", 5))
        ]
        ledger.save_problems(found, [])
    stage.configure(receiver.url, top='heartbeat_every = "1s"')

    daemon = stage.daemon().ready()

    daemon.wait_for("drop.problem", reason="suspicious", problems=1, archive="new.gz")
    listed = json.loads(stage.backupd("list", "--problems", "--json").stdout)
    assert [problem["relpath"] for problem in listed] == ["new.gz"]


def test_an_encrypted_archive_with_the_name_of_another_format_is_delivered_at_once(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop=f'{LONG_GRACE}on_suspicious = "reject"')
    daemon = stage.daemon().ready()

    stage.put("r1.tar.gz", b"Salted__" + os.urandom(5000))

    daemon.wait_for("archive.delivered", archive="r1.tar.gz")
    (noted,) = daemon.wait_for("inspection.noted", archive="r1.tar.gz")
    assert noted["reason"] == "misnamed"
    assert not daemon.events("archive.waiting")


def test_a_quick_inspection_rejects_a_truncated_archive_and_accepts_unknown_formats(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='inspect = "quick"\n' + SHORT_GRACE)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"hostname r1\n")
    stage.put("r3.bz2", bz2.compress(os.urandom(5000)))
    daemon.wait_for("archive.delivered", count=2)
    assert len(stage.stored()) == 2

    stage.put("r2.bz2", bz2.compress(os.urandom(5000))[:-50])

    daemon.wait_for("archive.rejected", archive="r2.bz2", reason="truncated")
    assert len(stage.stored()) == 2


@pytest.mark.parametrize("inspect", ["quick", "full"])
def test_a_changed_byte_in_a_zstd_block_is_detected(
    stage: Stage, receiver: RunningReceiver, inspect: str
) -> None:
    stage.configure(receiver.url, drop=f'inspect = "{inspect}"\n' + SHORT_GRACE)
    daemon = stage.daemon().ready()
    tar = gzip.decompress(a_backup())
    archive = zstd.compress(tar, options={zstd.CompressionParameter.checksum_flag: 1})
    stage.put("r1.tar.zst", archive)
    daemon.wait_for("archive.delivered", archive="r1.tar.zst")

    stage.put("r2.tar.zst", archive[:20_000] + bytes([archive[20_000] ^ 1]) + archive[20_001:])

    daemon.wait_for("archive.rejected", archive="r2.tar.zst", reason="damaged")
    assert len(stage.stored()) == 1


def is_examined(daemon: Daemon, path: Path) -> bool:
    """Return whether the daemon has a file open."""
    return any(os.path.realpath(fd) == str(path) for fd in Path(f"/proc/{daemon.pid}/fd").iterdir())


def an_examination_of_hours(stage: Stage, receiver: RunningReceiver) -> tuple[Daemon, Path]:
    """Start a daemon; return it and a file of a terabyte that it hashes."""
    stage.configure(receiver.url, drop='checksum_file = "auto"')
    daemon = stage.daemon().ready()
    stage.put("r1.cfg.sha256", b"0" * 64)
    part = stage.base / "part"
    with part.open("wb") as stream:
        stream.truncate(10**12)
    path = part.rename(stage.drop / "r1.cfg")
    until(lambda: is_examined(daemon, path), "the file to be hashed")
    return daemon, path


def test_a_stop_ends_an_examination(stage: Stage, receiver: RunningReceiver) -> None:
    daemon, _ = an_examination_of_hours(stage, receiver)

    assert daemon.stop() == 0

    (stopped,) = daemon.events("daemon.stopped")
    assert stopped["pending"] == 0  # counted only if all threads have ended


def test_a_reload_of_its_drop_ends_an_examination(stage: Stage, receiver: RunningReceiver) -> None:
    daemon, path = an_examination_of_hours(stage, receiver)

    stage.configure(receiver.url, drop='checksum_file = "auto"\nmax_size = "1GiB"')
    daemon.process.send_signal(signal.SIGHUP)

    daemon.wait_for("config.reloaded")
    until(lambda: not is_examined(daemon, path), "the end of the examination")
    stage.put("r2.cfg", b"hostname r2\n")
    daemon.wait_for("archive.delivered", archive="r2.cfg")


@pytest.mark.long
def test_a_decompression_bomb_takes_little_memory_and_is_delivered_with_the_others(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='inspect = "full"', top='[log]\nlevel = "debug"')
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(700)) + squeeze.flush()
    stage.put("bomb.gz", bomb)
    for number in range(20):
        stage.put(f"r{number}.tar.gz", a_backup(5000))
    daemon = stage.daemon(before=["env"]).ready()  # with its own imports alone

    daemon.wait_for("archive.disposed", count=21)

    assert [event["archive"] for event in daemon.events("inspection.ended")] == ["bomb.gz"]
    assert daemon.memory("VmHWM") < 80 << 20
    assert len(daemon.events("archive.delivered")) == 21


def test_an_archive_with_a_matching_checksum_is_delivered_and_moved_with_its_checksum_file(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='checksum_file = "required"\n' + LONG_GRACE)
    content = os.urandom(5000)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg.SHA512", hashlib.sha512(content).hexdigest().encode())
    stage.put("r1.cfg", content)
    stage.put("SHA256SUMS", f"{sha256(content)} *r2.cfg\n{'0' * 64} *r3.cfg\n".encode())
    stage.put("r2.cfg", content)

    daemon.wait_for("archive.disposed", count=2)

    assert sorted(path.name for path in stage.drop.iterdir() if path.is_file()) == ["SHA256SUMS"]
    assert (stage.sent / "r1.cfg.SHA512").exists()
    assert [path.read_bytes() for path in stage.stored()] == [content, content]
    assert not daemon.events("archive.ignored")


@pytest.mark.long
def test_an_archive_with_another_checksum_is_rejected_without_a_request(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='checksum_file = "auto"\n' + SHORT_GRACE)
    stage.put("r1.cfg.sha256", sha256(b"another").encode() + b"  r1.cfg\n")
    stage.put("r1.cfg", b"hostname r1\n")
    daemon = stage.daemon().ready()

    assert_rejected(stage, daemon, "r1.cfg", "checksum_mismatch")

    assert (stage.rejected / "r1.cfg.sha256").exists()
    assert not (stage.drop / "r1.cfg.sha256").exists()


@pytest.mark.long
def test_retry_moves_the_checksum_file_back_with_its_archive(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='checksum_file = "required"\n' + SHORT_GRACE)
    stage.put("r1.cfg.sha256", sha256(b"another").encode())
    stage.put("r1.cfg", b"hostname r1\n")
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.disposed", archive="r1.cfg")
    assert daemon.stop() == 0
    (stage.rejected / "r1.cfg.sha256").write_text(sha256(b"hostname r1\n"))

    assert stage.backupd("retry", "--all").returncode == 0

    assert list(stage.rejected.iterdir()) == []
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.disposed", archive="r1.cfg", disposition="moved")
    assert (stage.sent / "r1.cfg.sha256").exists()


def test_a_checksum_file_is_deleted_with_its_archive(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='checksum_file = "auto"\non_delivered = "delete"')
    stage.put("r1.cfg.sha256sum", sha256(b"r1").encode() + b"  r1.cfg\n")
    stage.put("r1.cfg", b"r1")
    (stage.drop / "r2.cfg.md5").write_text("of another archive")
    daemon = stage.daemon().ready()

    daemon.wait_for("archive.disposed", disposition="deleted")

    assert [path.name for path in stage.drop.iterdir()] == ["r2.cfg.md5"]


def test_an_archive_with_an_old_checksum_file_waits_for_the_new_one(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='checksum_file = "auto"\nrescan_every = "1h"\ninspect_grace = "1h"')
    daemon = stage.daemon().ready()
    stage.put("r1.cfg.sha256", sha256(b"yesterday").encode())
    stage.put("r1.cfg", b"today")
    stage.put("r2.cfg", b"without one")
    daemon.wait_for("archive.disposed", archive="r2.cfg")

    stage.put("r1.cfg.sha256", sha256(b"today").encode())

    daemon.wait_for("archive.disposed", archive="r1.cfg")
    assert not daemon.events("archive.rejected")


def test_waiting_for_a_required_checksum_is_logged_once(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='checksum_file = "required"\n' + SHORT_GRACE)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"hostname r1\n")
    (waiting,) = daemon.wait_for("archive.waiting")
    assert (waiting["archive"], waiting["reason"]) == ("r1.cfg", "checksum_missing")
    stage.put("r0.cfg.md5", hashlib.md5(b"r0").hexdigest().encode())
    stage.put("r0.cfg", b"r0")
    daemon.wait_for("archive.disposed", archive="r0.cfg")

    stage.put("r1.cfg.sha256", sha256(b"hostname r1\n").encode() + b"  r1.cfg\n")

    daemon.wait_for("archive.disposed", archive="r1.cfg")
    assert len(daemon.events("archive.waiting")) == 1
    assert not daemon.events("archive.rejected")


def _a_fifo(path: Path) -> None:
    os.mkfifo(path)


def _a_link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _a_folder(path: Path) -> None:
    path.mkdir()


def _huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(10 << 30)


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(3000))


@pytest.mark.long
@pytest.mark.parametrize("make", [_a_fifo, _a_link, _a_folder, _huge, _garbage])
@pytest.mark.parametrize("name", ["r1.cfg.sha256", "SHA256SUMS"])
def test_a_special_file_in_place_of_a_checksum_file_delays_no_archive_indefinitely(
    stage: Stage, receiver: RunningReceiver, make: object, name: str
) -> None:
    stage.configure(receiver.url, drop='checksum_file = "auto"\n' + SHORT_GRACE)
    assert callable(make)
    make(stage.drop / name)
    stage.put("r1.cfg", gzip.compress(b"hostname r1\n"))
    daemon = stage.daemon().ready()

    daemon.wait_for("archive.delivered", archive="r1.cfg")

    assert len(stage.stored()) == 1
    assert all(e["reason"] == "checksum_unusable" for e in daemon.events("archive.waiting"))
    assert not daemon.events("daemon.failed")
