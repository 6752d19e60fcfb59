"""Large archives: time, CPU, memory, and several at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.bench.ends import MIB, Ours, curl, missing, run
from tests.bench.setting import Setting, large, sparse, warm
from tests.bench.table import BrokenError, Claim, Figures, Race, Row


def one_large(setting: Setting) -> list[Row]:
    """P1 and P7: one archive, from its rename into the drop until it lies in sent/; and the CPU of that."""
    mib = 64 if setting.short else 2048
    gib = mib / 1024
    folder = setting.folder()
    folder.mkdir()
    archive = folder / "large.tar.gz"
    digest = large(archive, mib)
    ours = setting.ours()

    def by_ours() -> Figures:
        warm(archive)
        before, done = ours.cpu(), ours.count("archive.disposed")
        start = time.perf_counter()
        os.rename(archive, ours.drop / archive.name)
        ours.wait_settled(done + 1)
        seconds = time.perf_counter() - start
        used = ours.cpu() - before
        if digest not in ours.line("archive.delivered"):
            raise BrokenError("the digest is wrong")
        if ours.take_back(folder) != [archive]:
            raise BrokenError("the archive is not in sent/")
        return {"s": seconds, "CPU s/GiB": used / gib}

    def by_curl() -> Figures:
        warm(archive)
        seconds, used = curl(setting.pki, setting.nginx.url, archive)
        return {"s": seconds, "CPU s/GiB": used / gib}

    def by_openssl_and_curl() -> Figures:
        warm(archive)
        hashing, more, text = run("openssl", "dgst", "-sha256", str(archive))
        if digest not in text:
            raise BrokenError("openssl's digest is wrong")
        seconds, used = curl(setting.pki, setting.nginx.url, archive)
        return {"s": hashing + seconds, "CPU s/GiB": (more + used) / gib}

    both = "openssl, then curl"
    with ours.running():
        race = Race(
            setting.runs,
            {
                "ours": by_ours,
                "curl": missing("curl") or by_curl,
                both: missing("openssl", "curl") or by_openssl_and_curl,
            },
        )
    os.unlink(archive)
    judged = not setting.short
    return [
        Row(
            "P1",
            f"one archive of {mib} MiB, from its rename into the drop until it lies in sent/, hashed",
            race.columns("s"),
            [
                Claim("ours / curl", race.ratio("s", "ours", "curl"), at_most=1.25, judged=judged),
                Claim(f"ours / ({both})", race.ratio("s", "ours", both), at_most=0.8, judged=judged),
            ],
        ),
        Row(
            "P7",
            "CPU of the client (user and system), TLS 1.3 with AES-256-GCM; the runs of P1",
            race.columns("CPU s/GiB"),
            [Claim("CPU s/GiB", race.median("ours", "CPU s/GiB"), at_most=1.7, judged=judged)],
        ),
    ]


def memory(setting: Setting) -> list[Row]:
    """P3: peak memory must not depend on the size."""
    mib = 256 if setting.short else 10 * 1024
    little, much = "ours, 1 MiB", f"ours, {mib} MiB, sparse"
    no_room = setting.nginx.no_room(mib)

    def peak(size: int) -> Figures:
        ours = setting.ours()
        source = ours.drop.with_name("hole.tar.gz")
        sparse(source, size)
        with ours.running():
            os.rename(source, ours.drop / source.name)
            ours.wait_settled(1)
            top = ours.memory("VmHWM")
        if (ours.sent / source.name).stat().st_size != size * MIB:
            raise BrokenError("the archive is not in sent/")
        return {"MiB": top}

    race = Race(setting.runs, {little: lambda: peak(1), much: no_room or (lambda: peak(mib))})
    low, high = race.median(little, "MiB") or 0.0, race.median(much, "MiB")
    return [
        Row(
            "P3",
            "peak memory (VmHWM) of a daemon that delivered one archive",
            race.columns("MiB"),
            [
                Claim("difference in MiB", high and high - low, at_most=4, judged=not setting.short),
                Claim("peak in MiB", high and max(low, high), at_most=64, judged=not setting.short),
            ],
        )
    ]


def at_once(setting: Setting) -> list[Row]:
    """P8: several archives with four workers, and with one."""
    mib = 8 if setting.short else 256
    folder = setting.folder()
    folder.mkdir()
    archives = [folder / f"part-{number}.tar.gz" for number in range(8)]
    for archive in archives:
        large(archive, mib)

    def deliver(ours: Ours) -> Figures:
        warm(*archives)
        done, used, (busy, all_of_it) = ours.count("archive.disposed"), ours.cpu(), _machine_ticks()
        start = time.perf_counter()
        for archive in archives:
            os.rename(archive, ours.drop / archive.name)
        ours.wait_settled(done + len(archives))
        seconds = time.perf_counter() - start
        busy_after, all_after = _machine_ticks()
        share = (busy_after - busy) / max(1, all_after - all_of_it)
        used = ours.cpu() - used
        if ours.take_back(folder) != archives:
            raise BrokenError("the archives are not in sent/")
        return {"s": seconds, "CPU s": used, "% busy": 100 * share}

    four, one = setting.ours(workers=4), setting.ours(workers=1)
    with four.running(), one.running():
        race = Race(setting.runs, {"4 workers": lambda: deliver(four), "1 worker": lambda: deliver(one)})
    for archive in archives:
        os.unlink(archive)
    return [
        Row(
            "P8",
            f"8 archives of {mib} MiB at once",
            race.columns("s") + race.columns("CPU s") + race.columns("% busy"),
            [
                Claim(
                    "4 workers / 1 worker",
                    race.ratio("s", "4 workers", "1 worker"),
                    at_most=1.0,
                    judged=not setting.short,
                )
            ],
            ["% busy is of all cores of the machine, with nginx"],
        )
    ]


def _machine_ticks() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)
