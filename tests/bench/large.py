"""P1, P3, P7 and P8: large archives."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.bench.programs import MIB, Backupd, curl, missing, run
from tests.bench.setting import Setting, large, sparse, warm
from tests.bench.table import BrokenError, Figures, Goal, Race, Row


def one_large(setting: Setting) -> list[Row]:
    """P1 and P7: time from the rename of an archive into the drop folder to its move to sent/, and CPU."""
    mib = 64 if setting.short else 2048
    gib = mib / 1024
    folder = setting.folder()
    folder.mkdir()
    archive = folder / "large.tar.gz"
    digest = large(archive, mib)
    backupd = setting.backupd()

    def by_backupd() -> Figures:
        warm(archive)
        before, done = backupd.cpu(), backupd.count("archive.disposed")
        start = time.perf_counter()
        os.rename(archive, backupd.drop / archive.name)
        backupd.wait_until_recorded(done + 1)
        seconds = time.perf_counter() - start
        used = backupd.cpu() - before
        if digest not in backupd.line("archive.delivered"):
            raise BrokenError("the digest is wrong")
        if backupd.move_back(folder) != [archive]:
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
    with backupd.running():
        race = Race(
            setting.runs,
            {
                "backupd": by_backupd,
                "curl": missing("curl") or by_curl,
                both: missing("openssl", "curl") or by_openssl_and_curl,
            },
        )
    os.unlink(archive)
    checked = not setting.short
    return [
        Row(
            "P1",
            f"one archive of {mib} MiB, from its rename into the drop folder to its move to sent/",
            race.columns("s"),
            [
                Goal("backupd / curl", race.ratio("s", "backupd", "curl"), at_most=1.25, checked=checked),
                Goal(f"backupd / ({both})", race.ratio("s", "backupd", both), at_most=0.8, checked=checked),
            ],
        ),
        Row(
            "P7",
            "CPU of the client (user and system), TLS 1.3 with AES-256-GCM; the runs of P1",
            race.columns("CPU s/GiB"),
            [Goal("CPU s/GiB", race.median("backupd", "CPU s/GiB"), at_most=1.7, checked=checked)],
        ),
    ]


def memory(setting: Setting) -> list[Row]:
    """P3: peak memory, for archives of different sizes."""
    mib = 256 if setting.short else 10 * 1024
    little, much = "backupd, 1 MiB", f"backupd, {mib} MiB, sparse"
    skipped = setting.nginx.cannot_spool(mib)

    def peak(size: int) -> Figures:
        backupd = setting.backupd()
        source = backupd.drop.with_name("hole.img")
        sparse(source, size)
        with backupd.running():
            os.rename(source, backupd.drop / source.name)
            backupd.wait_until_recorded(1)
            top = backupd.memory("VmHWM")
        if (backupd.sent / source.name).stat().st_size != size * MIB:
            raise BrokenError("the archive is not in sent/")
        return {"MiB": top}

    race = Race(setting.runs, {little: lambda: peak(1), much: skipped or (lambda: peak(mib))})
    low, high = race.median(little, "MiB") or 0.0, race.median(much, "MiB")
    return [
        Row(
            "P3",
            "peak memory (VmHWM) of a daemon that delivered one archive",
            race.columns("MiB"),
            [
                Goal("difference in MiB", high and high - low, at_most=4, checked=not setting.short),
                Goal("peak in MiB", high and max(low, high), at_most=80, checked=not setting.short),
            ],
        )
    ]


def at_once(setting: Setting) -> list[Row]:
    """P8: several archives with four workers and with one."""
    mib = 8 if setting.short else 256
    folder = setting.folder()
    folder.mkdir()
    archives = [folder / f"part-{number}.tar.gz" for number in range(8)]
    for archive in archives:
        large(archive, mib)

    def deliver(backupd: Backupd) -> Figures:
        warm(*archives)
        done, used, (busy, total) = backupd.count("archive.disposed"), backupd.cpu(), _machine_ticks()
        start = time.perf_counter()
        for archive in archives:
            os.rename(archive, backupd.drop / archive.name)
        backupd.wait_until_recorded(done + len(archives))
        seconds = time.perf_counter() - start
        busy_after, all_after = _machine_ticks()
        share = (busy_after - busy) / max(1, all_after - total)
        used = backupd.cpu() - used
        if backupd.move_back(folder) != archives:
            raise BrokenError("the archives are not in sent/")
        return {"s": seconds, "CPU s": used, "% busy": 100 * share}

    four, one = setting.backupd(workers=4), setting.backupd(workers=1)
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
                Goal(
                    "4 workers / 1 worker",
                    race.ratio("s", "4 workers", "1 worker"),
                    at_most=1.0,
                    checked=not setting.short,
                )
            ],
            ["% busy is of all cores of the machine, with nginx"],
        )
    ]


def _machine_ticks() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)
