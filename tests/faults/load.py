"""Deliver 100,000 archives in one folder, written before the daemon starts or while it runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults.campaign import CampaignOptions, Report
from tests.stage import Daemon, Stage, until

MAX_ARCHIVES = 100_000
_SLOW_RATE = 60
"""Archives that a slow machine delivers in a second; a campaign with little time uses fewer."""


def _content(number: int) -> bytes:
    return b"configuration %d\n" % number * 8


def _name(number: int) -> str:
    return f"sw-{number:06}.cfg"


def fill(stage: Stage, count: int) -> None:
    """Rename so many new archives into the drop folder."""
    staging = stage.base / "staging"
    staging.mkdir(exist_ok=True)
    for number in range(count):
        part = staging / "part"
        part.write_bytes(_content(number))
        part.rename(stage.drop / _name(number))


def differences(stage: Stage, count: int) -> list[str]:
    """Return the differences from the expected state at the receiver, in `sent` and in the ledger."""
    names = {_name(number) for number in range(count)}
    expected = {
        f"{Path(_name(n)).stem}.{hashlib.sha256(_content(n)).hexdigest()[:16]}.cfg" for n in range(count)
    }
    stored = set(os.listdir(stage.store / "archives"))
    sent = set(os.listdir(stage.sent))
    receipts = {f"{name}.receipt.json" for name in names}
    waiting = {name for name in os.listdir(stage.drop) if not (stage.drop / name).is_dir()}
    with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        verified = ledger.execute(
            "SELECT count(*), count(DISTINCT relpath) FROM archive JOIN delivery ON archive_id = archive.id"
            " WHERE archive.state = 'delivered' AND disposition = 'done' AND verified = 1"
        ).fetchone()
    found = []
    for place, differing in (
        ("at the receiver", expected ^ stored),
        ("in sent", (names | receipts) ^ sent),
        ("in the drop folder", waiting),
    ):
        if differing:
            found.append(f"{len(differing)} wrong files {place}, such as {min(differing)}")
    if verified != (count, count):
        found.append(f"the ledger has {verified} verified deliveries of {count}")
    return found


def _delivered(stage: Stage, count: int) -> Callable[[], bool]:
    def are_delivered() -> bool:
        with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=60)) as ledger:
            row = ledger.execute("SELECT count(*) FROM archive WHERE disposition = 'done'").fetchone()
        return int(row[0]) >= count

    return are_delivered


def before_start(stage: Stage, count: int) -> Daemon:
    """Write the archives, then start the daemon."""
    fill(stage, count)
    return stage.daemon()


def while_running(stage: Stage, count: int) -> Daemon:
    """Start the daemon, then write the archives as fast as possible."""
    daemon = stage.daemon().ready()
    fill(stage, count)
    return daemon


def run(base: Path, count: int, write: Callable[[Stage, int], Daemon]) -> tuple[list[str], str]:
    """Deliver archives; return the differences from the expected state, and a line of figures."""
    base.mkdir()
    stage = Stage(base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    try:
        with RunningReceiver(stage.store, tls) as receiver:
            stage.configure(receiver.url, drop='stable_for = "0s"')
            began = time.monotonic()
            daemon = write(stage, count)
            daemon.ready()
            ready_after = time.monotonic() - began
            until(_delivered(stage, count), "all archives", timeout=3600)
            seconds = time.monotonic() - began
            peak = daemon.memory("VmHWM")
            found = differences(stage, count)
            if daemon.stop() != 0:
                found.append(f"the daemon ended with {daemon.process.returncode}")
    finally:
        stage.end()
    return found, (
        f"{count} archives, {len(found)} kinds of differences, {seconds:.0f} s ({count / seconds:.0f}/s),"
        f" ready after {ready_after:.1f} s, peak memory {peak / 2**20:.0f} MiB"
    )


def among_other_files(base: Path, count: int) -> tuple[list[str], str]:
    """Deliver one archive among so many files that are no archives; return the same as `run`."""
    base.mkdir()
    stage = Stage(base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    folder = os.open(stage.drop, os.O_RDONLY)
    try:
        for number in range(count):
            os.mknod(f"other-{number}.pdf", dir_fd=folder)
        with RunningReceiver(stage.store, tls) as receiver:
            stage.configure(
                receiver.url, drop='stable_for = "0s"\nrescan_every = "10s"', more='[log]\nlevel = "debug"'
            )
            began = time.monotonic()
            daemon = stage.daemon()
            until(lambda: b'"daemon.ready"' in stage.log.read_bytes(), "the daemon to be ready", timeout=600)
            ready = time.monotonic() - began
            stage.put("r1.cfg", b"among them")
            until((stage.sent / "r1.cfg.receipt.json").exists, "the receipt file", timeout=600)
            took = time.monotonic() - began - ready
            scans = stage.log.read_bytes().count(b'"drop.scanned"')
            until(  # at least two complete scans, which must log nothing again
                lambda: stage.log.read_bytes().count(b'"drop.scanned"') >= scans + 3,
                "more scans",
                timeout=600,
            )
            peak = daemon.memory("VmHWM")
            assert daemon.stop() == 0
        text = stage.log.read_bytes()
    finally:
        os.close(folder)
        stage.end()
    lines = text.count(b'"archive.ignored"')
    found = [] if lines <= min(count, 100_001) else [f"{lines} lines for {count} files"]
    found += ["the watcher was logged as degraded"] * (b'"watch.degraded"' in text)
    return found, (
        f"one archive among {count} other files, ready after {ready:.1f} s, sent in {took:.2f} s,"
        f" {lines} lines, peak memory {peak / 2**20:.0f} MiB"
    )


def campaign(options: CampaignOptions) -> Report:
    """Run the three cases, with as many files as fit into the time."""
    count = options.archives or min(MAX_ARCHIVES, int((options.deadline - time.monotonic()) / 2 * _SLOW_RATE))
    report = Report()
    for name, write in (("before the start", before_start), ("while it runs", while_running)):
        found, figures = run(options.base / name.replace(" ", "-"), count, write)
        report.tried += 1
        report.broken += [f"{name}: {'; '.join(found)}"] * bool(found)
        report.figures[name] = figures
    found, report.figures["among other files"] = among_other_files(options.base / "other-files", 10 * count)
    report.tried += 1
    report.broken += [f"among other files: {'; '.join(found)}"] * bool(found)
    return report
