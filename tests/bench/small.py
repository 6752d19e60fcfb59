"""P2, P4 and P5: small archives."""

from __future__ import annotations

import os
import statistics
import time

from tests.bench.programs import FolderWatch, Rclone, curl_each, missing
from tests.bench.setting import Setting, warm
from tests.bench.table import BrokenError, Column, Figures, Goal, Race, Row


def many(setting: Setting) -> list[Row]:
    """P2: rate from the first rename to the last move to sent/, with every receipt file synced."""
    count = 100 if setting.short else 2000
    archives = setting.small(count)
    folder = archives[0].parent
    backupd = setting.backupd()
    rclone = None if missing("rclone") else Rclone(setting.pki)

    def by_backupd() -> Figures:
        warm(*archives)
        done = backupd.count("archive.disposed")
        start = time.perf_counter()
        for archive in archives:
            os.rename(archive, backupd.drop / archive.name)
        backupd.wait_until_recorded(done + count)
        seconds = time.perf_counter() - start
        receipts = sum(name.endswith(".receipt.json") for name in os.listdir(backupd.sent))
        if backupd.move_back(folder) != archives or receipts != count:
            raise BrokenError("the archives or their receipts are not in sent/")
        return {"files/s": count / seconds}

    def by_rclone() -> Figures:
        assert rclone is not None
        warm(*archives)
        return {"files/s": count / rclone.copy(folder, count)}

    def by_curl() -> Figures:
        warm(*archives)
        return {"files/s": count / curl_each(setting.pki, setting.nginx.url, archives)}

    each = "curl, a process for each"
    try:
        with backupd.running():
            race = Race(
                setting.runs,
                {
                    "backupd": by_backupd,
                    "rclone": missing("rclone") or by_rclone,
                    each: missing("curl", "xargs") or by_curl,
                },
            )
    finally:
        if rclone is not None:
            rclone.stop()
    checked = not setting.short
    unit = "files/s"
    return [
        Row(
            "P2",
            f"{count} archives of 20 kB, from the first rename to the last move, every receipt file synced",
            race.columns(unit),
            [
                Goal("files/s", race.median("backupd", unit), at_least=700, checked=checked),
                Goal("backupd / rclone", race.ratio(unit, "backupd", "rclone"), at_least=15, checked=checked),
                Goal(f"backupd / ({each})", race.ratio(unit, "backupd", each), at_least=15, checked=checked),
            ],
            ["rclone copies to `rclone serve webdav`, both with mTLS, into memory, without fsync"],
        )
    ]


def soon(setting: Setting) -> list[Row]:
    """P4: time from the close of an archive to its receipt file, one archive at a time."""
    count = 50 if setting.short else 500
    content = os.urandom(20_000)

    def one_by_one() -> Figures:
        backupd = setting.backupd()
        backupd.sent.mkdir()
        took = []
        with backupd.running():
            watch = FolderWatch(backupd.sent)
            for number in range(count):
                name = f"soon-{number:06}.tar.gz"
                with (backupd.drop / name).open("wb", buffering=0) as stream:
                    stream.write(content)
                    start = time.perf_counter()
                watch.wait(f"{name}.receipt.json", backupd.process)
                took.append(1000 * (time.perf_counter() - start))
            watch.close()
            backupd.wait_until_recorded(count)
        steps = statistics.quantiles(took, n=100, method="inclusive")
        return {"ms, p50": statistics.median(took), "ms, p99": steps[98], "ms, max": max(took)}

    race = Race(setting.runs, {"backupd": one_by_one})
    checked = not setting.short
    return [
        Row(
            "P4",
            f"{count} archives of 20 kB one at a time, from the close to the receipt; stable_for is 0s",
            race.columns("ms, p50") + race.columns("ms, p99") + race.columns("ms, max"),
            [
                Goal("p50 in ms", race.median("backupd", "ms, p50"), at_most=10, checked=checked),
                Goal("p99 in ms", race.median("backupd", "ms, p99"), at_most=50, checked=checked),
            ],
        )
    ]


def waiting(setting: Setting) -> list[Row]:
    """P5: many archives in the drop folder at the start."""
    count = 500 if setting.short else 100_000
    archives = setting.small(count)
    folder = archives[0].parent

    def start_over() -> Figures:
        backupd = setting.backupd()
        for archive in archives:
            os.rename(archive, backupd.drop / archive.name)
        os.sync()
        start = time.perf_counter()
        with backupd.running():
            backupd.wait_for("archive.queued", count, every=0.05)
            queued, peak = time.perf_counter(), backupd.memory("VmHWM")
            before = backupd.count("archive.disposed")
            backupd.wait_for("archive.disposed", count, every=0.05)
            rest = time.perf_counter() - queued
            backupd.wait_until_recorded(count)
            peak_after = backupd.memory("VmHWM")
        if backupd.move_back(folder) != archives:
            raise BrokenError("the archives are not in sent/")
        figures = {"s to queue": queued - start, "MiB then": peak, "MiB at last": peak_after}
        return figures | ({"files/s": (count - before) / rest} if before < count else {})

    runs = min(setting.runs, 3)
    race = Race(runs, {"backupd": start_over})
    checked = not setting.short
    columns: list[Column] = []
    for unit in ("s to queue", "MiB then", "MiB at last", "files/s"):
        columns += race.columns(unit)
    return [
        Row(
            "P5",
            f"{count} archives of 20 kB in the drop folder at the start",
            columns,
            [
                Goal("s to queue all", race.median("backupd", "s to queue"), at_most=10, checked=checked),
                Goal("MiB then", race.median("backupd", "MiB then"), at_most=160, checked=checked),
                Goal("files/s then", race.median("backupd", "files/s"), at_least=700, checked=checked),
            ],
            ["counted from the start of the process; at most 3 runs"],
        )
    ]
