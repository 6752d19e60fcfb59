"""A hundred thousand archives in one folder, before the daemon starts and while it runs: none is missed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults.campaign import Report, Terms
from tests.stage import Daemon, Stage, until

ALL = 100_000
_CAREFUL = 60
"""Archives that a slow machine brings to their end in a second; a campaign with little time takes fewer."""


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


def missed(stage: Stage, count: int) -> list[str]:
    """Return what is not as it has to be, at the receiver, in `sent` and in the ledger."""
    names = {_name(number) for number in range(count)}
    wanted = {
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
    for what, differs in (
        ("at the receiver", wanted ^ stored),
        ("in sent", (names | receipts) ^ sent),
        ("left in the drop folder", waiting),
    ):
        if differs:
            found.append(f"{len(differs)} wrong {what}, such as {min(differs)}")
    if verified != (count, count):
        found.append(f"the ledger has {verified} verified, of {count}")
    return found


def _settled(stage: Stage, count: int) -> Callable[[], bool]:
    def are_settled() -> bool:
        with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=60)) as ledger:
            row = ledger.execute("SELECT count(*) FROM archive WHERE disposition = 'done'").fetchone()
        return int(row[0]) >= count

    return are_settled


def before_it_starts(stage: Stage, count: int) -> Daemon:
    """Have the daemon find them all at its start."""
    fill(stage, count)
    return stage.daemon()


def while_it_runs(stage: Stage, count: int) -> Daemon:
    """Have them all appear under the daemon, as quick as they can be written."""
    daemon = stage.daemon().ready()
    fill(stage, count)
    return daemon


def run(base: Path, count: int, appear: Callable[[Stage, int], Daemon]) -> tuple[list[str], str]:
    """Have archives delivered; return what was missed, and a line of figures."""
    base.mkdir()
    stage = Stage(base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    try:
        with RunningReceiver(stage.store, tls) as receiver:
            stage.configure(receiver.url, drop='stable_for = "0s"')
            began = time.monotonic()
            daemon = appear(stage, count)
            daemon.ready()
            admitted_all = time.monotonic() - began
            until(_settled(stage, count), "all archives", patience=3600)
            seconds = time.monotonic() - began
            peak = daemon.memory("VmHWM")
            found = missed(stage, count)
            if daemon.stop() != 0:
                found.append(f"it ended with {daemon.process.returncode}")
    finally:
        stage.end()
    return found, (
        f"{count} archives, {len(found)} kinds of fault, {seconds:.0f} s ({count / seconds:.0f}/s),"
        f" ready after {admitted_all:.1f} s, peak memory {peak / 2**20:.0f} MiB"
    )


def among_rubbish(base: Path, count: int) -> tuple[list[str], str]:
    """Have one archive delivered among so many files that are none; return as `run` does."""
    base.mkdir()
    stage = Stage(base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    folder = os.open(stage.drop, os.O_RDONLY)
    try:
        for number in range(count):
            os.mknod(f"rubbish-{number}.pdf", dir_fd=folder)
        with RunningReceiver(stage.store, tls) as receiver:
            stage.configure(
                receiver.url, drop='stable_for = "0s"\nrescan_every = "10s"', more='[log]\nlevel = "debug"'
            )
            began = time.monotonic()
            daemon = stage.daemon()
            until(lambda: b'"daemon.ready"' in stage.log.read_bytes(), "it to be ready", patience=600)
            ready = time.monotonic() - began
            stage.put("r1.cfg", b"among them")
            until((stage.sent / "r1.cfg.receipt.json").exists, "the archive", patience=600)
            took = time.monotonic() - began - ready
            scans = stage.log.read_bytes().count(b'"drop.scanned"')
            until(  # two more whole ones, in which nothing is to be said again
                lambda: stage.log.read_bytes().count(b'"drop.scanned"') >= scans + 3, "scans", patience=600
            )
            peak = daemon.memory("VmHWM")
            assert daemon.stop() == 0
        text = stage.log.read_bytes()
    finally:
        os.close(folder)
        stage.end()
    said = text.count(b'"archive.ignored"')
    found = [] if said <= min(count, 100_001) else [f"{said} lines of {count} files"]
    found += ["the watcher was taken for blind"] * (b'"watch.degraded"' in text)
    return found, (
        f"one archive among {count} files that are none, ready after {ready:.1f} s, sent in {took:.2f} s,"
        f" {said} lines, peak memory {peak / 2**20:.0f} MiB"
    )


def campaign(terms: Terms) -> Report:
    """Try all three, with as many files as there is time for."""
    count = terms.archives or min(ALL, int((terms.until - time.monotonic()) / 2 * _CAREFUL))
    report = Report()
    for name, appear in (("before it starts", before_it_starts), ("while it runs", while_it_runs)):
        found, figures = run(terms.base / name.replace(" ", "-"), count, appear)
        report.tried += 1
        report.broken += [f"{name}: {'; '.join(found)}"] * bool(found)
        report.figures[name] = figures
    found, report.figures["among rubbish"] = among_rubbish(terms.base / "rubbish", 10 * count)
    report.tried += 1
    report.broken += [f"among rubbish: {'; '.join(found)}"] * bool(found)
    return report
