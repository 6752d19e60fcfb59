"""Small archives: how many a second, how soon, and a hundred thousand at the start."""

from __future__ import annotations

import os
import statistics
import time

from tests.bench.ends import Notices, Rclone, curl_each, missing
from tests.bench.setting import Setting, warm
from tests.bench.table import BrokenError, Claim, Column, Figures, Race, Row


def many(setting: Setting) -> list[Row]:
    """P2: from the first rename until the last lies in sent/, every receipt durable."""
    count = 100 if setting.short else 2000
    archives = setting.small(count)
    folder = archives[0].parent
    ours = setting.ours()
    rclone = None if missing("rclone") else Rclone(setting.pki)

    def by_ours() -> Figures:
        warm(*archives)
        done = ours.count("archive.disposed")
        start = time.perf_counter()
        for archive in archives:
            os.rename(archive, ours.drop / archive.name)
        ours.wait_settled(done + count)
        seconds = time.perf_counter() - start
        receipts = sum(name.endswith(".receipt.json") for name in os.listdir(ours.sent))
        if ours.take_back(folder) != archives or receipts != count:
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
        with ours.running():
            race = Race(
                setting.runs,
                {
                    "ours": by_ours,
                    "rclone": missing("rclone") or by_rclone,
                    each: missing("curl", "xargs") or by_curl,
                },
            )
    finally:
        if rclone is not None:
            rclone.stop()
    judged = not setting.short
    unit = "files/s"
    return [
        Row(
            "P2",
            f"{count} archives of 20 kB, from the first rename to the last in sent/, every receipt durable",
            race.columns(unit),
            [
                Claim("files/s", race.median("ours", unit), at_least=700, judged=judged),
                Claim("ours / rclone", race.ratio(unit, "ours", "rclone"), at_least=15, judged=judged),
                Claim(f"ours / ({each})", race.ratio(unit, "ours", each), at_least=15, judged=judged),
            ],
            ["rclone copies to `rclone serve webdav`, both with mTLS, into memory; it syncs nothing"],
        )
    ]


def soon(setting: Setting) -> list[Row]:
    """P4: from the close of an archive until its receipt is there, one at a time."""
    count = 50 if setting.short else 500
    content = os.urandom(20_000)

    def one_by_one() -> Figures:
        ours = setting.ours()
        ours.sent.mkdir()
        took = []
        with ours.running():
            notices = Notices(ours.sent)
            for number in range(count):
                name = f"soon-{number:06}.tar.gz"
                with (ours.drop / name).open("wb", buffering=0) as stream:
                    stream.write(content)
                    start = time.perf_counter()
                notices.wait(f"{name}.receipt.json", ours.process)
                took.append(1000 * (time.perf_counter() - start))
            notices.close()
            ours.wait_settled(count)
        steps = statistics.quantiles(took, n=100, method="inclusive")
        return {"ms, p50": statistics.median(took), "ms, p99": steps[98], "ms, max": max(took)}

    race = Race(setting.runs, {"ours": one_by_one})
    judged = not setting.short
    return [
        Row(
            "P4",
            f"{count} archives of 20 kB one at a time, from the close to the receipt; stable_for is 0s",
            race.columns("ms, p50") + race.columns("ms, p99") + race.columns("ms, max"),
            [
                Claim("p50 in ms", race.median("ours", "ms, p50"), at_most=10, judged=judged),
                Claim("p99 in ms", race.median("ours", "ms, p99"), at_most=50, judged=judged),
            ],
        )
    ]


def waiting(setting: Setting) -> list[Row]:
    """P5: a folder full of archives at the start."""
    count = 500 if setting.short else 100_000
    archives = setting.small(count)
    folder = archives[0].parent

    def start_over() -> Figures:
        ours = setting.ours()
        for archive in archives:
            os.rename(archive, ours.drop / archive.name)
        os.sync()
        start = time.perf_counter()
        with ours.running():
            ours.wait_for("archive.queued", count, every=0.05)
            admitted, peak = time.perf_counter(), ours.memory("VmHWM")
            before = ours.count("archive.disposed")
            ours.wait_for("archive.disposed", count, every=0.05)
            rest = time.perf_counter() - admitted
            ours.wait_settled(count)
            peak_after = ours.memory("VmHWM")
        if ours.take_back(folder) != archives:
            raise BrokenError("the archives are not in sent/")
        figures = {"s to admit": admitted - start, "MiB then": peak, "MiB at last": peak_after}
        return figures | ({"files/s": (count - before) / rest} if before < count else {})

    runs = min(setting.runs, 3)
    race = Race(runs, {"ours": start_over})
    judged = not setting.short
    columns: list[Column] = []
    for unit in ("s to admit", "MiB then", "MiB at last", "files/s"):
        columns += race.columns(unit)
    return [
        Row(
            "P5",
            f"{count} archives of 20 kB that wait at the start",
            columns,
            [
                Claim("s to admit all", race.median("ours", "s to admit"), at_most=10, judged=judged),
                Claim("MiB then", race.median("ours", "MiB then"), at_most=160, judged=judged),
                Claim("files/s then", race.median("ours", "files/s"), at_least=700, judged=judged),
            ],
            ["counted from the start of the process; at most 3 runs"],
        )
    ]
