"""A daemon with a long past: idle, and at its start."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import uuid

from backupd.ledger.sqlite.connection import FILE_NAME
from tests.bench.ends import Ours
from tests.bench.setting import Setting
from tests.bench.table import Claim, Column, Figures, Race, Row


def idle(setting: Setting) -> list[Row]:
    """P6: three drops with many sent archives below them, and nothing to do."""
    count = 1000 if setting.short else 100_000
    ours = setting.ours(drops=3)
    _age(ours, count, files=True)
    seconds = min(setting.idle_seconds, 5.0) if setting.short else setting.idle_seconds
    memory: list[float] = []
    with ours.running():
        time.sleep(2 if setting.short else 20)
        used, start = ours.cpu(), time.perf_counter()
        for _ in range(10):
            time.sleep(seconds / 10)
            memory.append(ours.memory("VmRSS"))
        share = 100 * (ours.cpu() - used) / (time.perf_counter() - start)
    growth = memory[-1] - memory[3]  # by then the first rescan is past
    judged = not setting.short
    return [
        Row(
            "P6",
            f"idle for {seconds:g} s with three drops and {count} sent archives below them",
            [
                Column("ours", "% of a core", [share]),
                Column("ours", "MiB RSS", memory),
                Column("ours", "MiB growth", [growth]),
            ],
            [
                Claim("% of a core", share, at_most=0.2, judged=judged),
                Claim("MiB RSS", max(memory), at_most=50, judged=judged),
                Claim("growth in MiB", growth, at_most=0.25, judged=judged),
            ],
            ["one run; the samples of the memory are a tenth of the time apart"],
        )
    ]


def start(setting: Setting) -> list[Row]:
    """P10: from the start of the process until it says READY=1."""
    count = 1000 if setting.short else 100_000
    fresh, old = setting.ours(), setting.ours()
    _age(old, count, files=False)

    def begin(ours: Ours) -> Figures:
        try:
            return {"s": ours.start()}
        finally:
            ours.stop()

    def anew() -> Figures:
        shutil.rmtree(fresh.state, ignore_errors=True)
        return begin(fresh)

    past = f"{count} rows"
    begin(old)
    race = Race(setting.runs, {"empty": anew, past: lambda: begin(old)})
    judged = not setting.short
    return [
        Row(
            "P10",
            f"start to READY=1, with an empty ledger and with {count} delivered archives in it",
            race.columns("s"),
            [
                Claim("s, empty", race.median("empty", "s"), at_most=1, judged=judged),
                Claim(f"s, {past}", race.median(past, "s"), at_most=1, judged=judged),
                Claim(f"{past} / empty", race.ratio("s", past, "empty"), at_most=1.1, judged=judged),
            ],
        )
    ]


def _age(ours: Ours, count: int, *, files: bool) -> None:
    """Give a daemon a past: one archive for each drop is delivered, and what that left is multiplied."""
    with ours.running():
        for drop in ours.drops:
            (drop / "first.tar.gz").write_bytes(os.urandom(1000))
        ours.wait_settled(len(ours.drops))
    ledger = sqlite3.connect(ours.state / FILE_NAME, isolation_level=None)
    ledger.row_factory = sqlite3.Row
    ledger.execute("BEGIN")
    firsts = ledger.execute("SELECT * FROM archive ORDER BY id").fetchall()
    next_id = max(row["id"] for row in firsts) + 1
    for first, drop in zip(firsts, ours.drops, strict=True):
        delivery = ledger.execute("SELECT * FROM delivery WHERE archive_id = ?", (first["id"],)).fetchone()
        attempt = ledger.execute("SELECT * FROM attempt WHERE delivery_id = ?", (delivery["id"],)).fetchone()
        for _ in range(count // len(ours.drops)):
            name = f"past-{next_id:06}.tar.gz"
            ident, sent = str(uuid.uuid4()), f"sent/{name}".encode()
            _copy(
                ledger, "archive", first, id=next_id, relpath=name.encode(), inode=next_id, disposed_to=sent
            )
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
