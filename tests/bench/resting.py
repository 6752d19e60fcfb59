"""P6 and P10: a daemon with many delivered archives, idle and at its start."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import uuid

from backupd.ledger.sqlite.connection import FILE_NAME
from tests.bench.programs import Backupd
from tests.bench.setting import Setting
from tests.bench.table import Column, Figures, Goal, Race, Row


def idle(setting: Setting) -> list[Row]:
    """P6: an idle daemon, with three drop folders and many archives in sent/."""
    count = 1000 if setting.short else 100_000
    backupd = setting.backupd(drops=3)
    add_history(backupd, count, files=True)
    seconds = min(setting.idle_seconds, 5.0) if setting.short else setting.idle_seconds
    memory: list[float] = []
    with backupd.running():
        time.sleep(2 if setting.short else 20)
        used, start = backupd.cpu(), time.perf_counter()
        for _ in range(10):
            time.sleep(seconds / 10)
            memory.append(backupd.memory("VmRSS"))
        share = 100 * (backupd.cpu() - used) / (time.perf_counter() - start)
    growth = memory[-1] - memory[3]  # after the first rescan
    checked = not setting.short
    return [
        Row(
            "P6",
            f"idle for {seconds:g} s with three drop folders and {count} archives in sent/",
            [
                Column("backupd", "% of a core", [share]),
                Column("backupd", "MiB RSS", memory),
                Column("backupd", "MiB growth", [growth]),
            ],
            [
                Goal("% of a core", share, at_most=0.2, checked=checked),
                Goal("MiB RSS", max(memory), at_most=75, checked=checked),
                Goal("growth in MiB", growth, at_most=0.25, checked=checked),
            ],
            ["one run; ten samples of the memory"],
        )
    ]


def start(setting: Setting) -> list[Row]:
    """P10: time from the start of the process to READY=1."""
    count = 1000 if setting.short else 100_000
    fresh, old = setting.backupd(), setting.backupd()
    add_history(old, count, files=False)

    def begin(backupd: Backupd) -> Figures:
        try:
            return {"s": backupd.start()}
        finally:
            backupd.stop()

    def begin_empty() -> Figures:
        shutil.rmtree(fresh.state, ignore_errors=True)
        return begin(fresh)

    filled = f"{count} rows"
    begin(old)
    race = Race(setting.runs, {"empty": begin_empty, filled: lambda: begin(old)})
    checked = not setting.short
    return [
        Row(
            "P10",
            f"start to READY=1, with an empty ledger and with {count} delivered archives in it",
            race.columns("s"),
            [
                Goal("s, empty", race.median("empty", "s"), at_most=1, checked=checked),
                Goal(f"s, {filled}", race.median(filled, "s"), at_most=1, checked=checked),
                Goal(f"{filled} / empty", race.ratio("s", filled, "empty"), at_most=1.1, checked=checked),
            ],
        )
    ]


def add_history(backupd: Backupd, count: int, *, files: bool) -> None:
    """Deliver one archive for each drop, and copy its rows and files `count` times in total."""
    with backupd.running():
        for drop in backupd.drops:
            (drop / "first.tar.gz").write_bytes(os.urandom(1000))
        backupd.wait_until_recorded(len(backupd.drops))
    ledger = sqlite3.connect(backupd.state / FILE_NAME, isolation_level=None)
    ledger.row_factory = sqlite3.Row
    ledger.execute("BEGIN")
    firsts = ledger.execute("SELECT * FROM archive ORDER BY id").fetchall()
    next_id = max(row["id"] for row in firsts) + 1
    for first, drop in zip(firsts, backupd.drops, strict=True):
        delivery = ledger.execute("SELECT * FROM delivery WHERE archive_id = ?", (first["id"],)).fetchone()
        attempt = ledger.execute("SELECT * FROM attempt WHERE delivery_id = ?", (delivery["id"],)).fetchone()
        for _ in range(count // len(backupd.drops)):
            name = f"past-{next_id:06}.tar.gz"
            ident, sent = str(uuid.uuid4()), f"sent/{name}".encode()
            _copy(ledger, "archive", first, id=next_id, relpath=name.encode(), inode=next_id, moved_to=sent)
            _copy(ledger, "delivery", delivery, id=ident, archive_id=next_id)
            _copy(ledger, "attempt", attempt, delivery_id=ident)
            if files:
                (drop / "sent" / name).write_bytes(b"x" * 1000)
                (drop / "sent" / f"{name}.receipt.json").write_bytes(b"{}\n")
            next_id += 1
    ledger.execute("COMMIT")
    ledger.close()


def _copy(ledger: sqlite3.Connection, table: str, row: sqlite3.Row, **changed: object) -> None:
    values = {**dict(row), **changed}
    marks = ", ".join("?" * len(values))
    ledger.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", list(values.values()))
