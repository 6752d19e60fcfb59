"""P9: a destination with a round trip of 50 ms."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.programs import Backupd, Nginx, curl, curl_each, end, free_port, missing, wait_for_port
from tests.bench.setting import Setting, large, warm
from tests.bench.table import BrokenError, Column, Figures, Goal, Race, Row

ONE_WAY = 0.025


@dataclass
class SlowPath:
    """A slow path to the endpoint: its URL, the command prefix of the clients, and a description."""

    url: str
    prefix: Sequence[str]
    description: str
    netem: bool


def far(setting: Setting) -> list[Row]:
    """P9: one large archive and many small ones."""
    mib, count = (4, 20) if setting.short else (64, 200)
    smalls = setting.small(count)
    archive = setting.folder()
    archive.mkdir()
    archive /= "far.tar.gz"
    large(archive, mib)
    pki = setting.pki
    with _slow_path(setting) as path:
        backupd = Backupd(setting.folder(), pki, path.url, prefix=path.prefix)

        def backupd_large() -> Figures:
            return {"s": _deliver(backupd, [archive])}

        def backupd_small() -> Figures:
            return {"files/s": count / _deliver(backupd, smalls)}

        def curl_large() -> Figures:
            warm(archive)
            return {"s": curl(pki, path.url, archive, path.prefix)[0]}

        def curl_small() -> Figures:
            return {"files/s": count / curl_each(pki, path.url, smalls, path.prefix)}

        with backupd.running():
            one = Race(setting.runs, {"backupd": backupd_large, "curl": missing("curl") or curl_large})
            each = "curl, a process for each"
            many = Race(
                setting.runs, {"backupd": backupd_small, each: missing("curl", "xargs") or curl_small}
            )
    os.unlink(archive)
    checked = not setting.short
    columns = one.columns("s") + many.columns("files/s")
    if not path.netem:
        reason = "needs root, ip, tc and netem in the kernel"
        columns.append(Column("the same with 0.1 % loss", "s", skipped=reason))
    return [
        Row(
            "P9",
            f"{path.description}: one archive of {mib} MiB, and {count} of 20 kB",
            columns,
            [
                Goal(
                    "one archive: backupd / curl",
                    one.ratio("s", "backupd", "curl"),
                    at_most=1.1,
                    checked=checked and path.netem,
                ),
                Goal(
                    "small archives: backupd / curl",
                    many.ratio("files/s", "backupd", each),
                    at_least=5,
                    checked=checked,
                ),
            ],
        )
    ]


def _deliver(backupd: Backupd, archives: list[Path]) -> float:
    warm(*archives)
    done = backupd.count("archive.disposed")
    start = time.perf_counter()
    for archive in archives:
        os.rename(archive, backupd.drop / archive.name)
    backupd.wait_until_recorded(done + len(archives))
    seconds = time.perf_counter() - start
    if backupd.move_back(archives[0].parent) != archives:
        raise BrokenError("the archives are not in sent/")
    return seconds


@contextmanager
def _slow_path(setting: Setting) -> Iterator[SlowPath]:
    name = f"bench{os.getpid()}"
    if _netem(name):
        try:
            prefix = ("ip", "netns", "exec", name)
            nginx = Nginx(setting.folder(), setting.pki, prefix)
            try:
                yield SlowPath(nginx.url, prefix, "round trip of 50 ms with 0.1 % loss (netem)", netem=True)
            finally:
                nginx.stop()
        finally:
            _ip("ip", "netns", "del", name)
        return
    port = free_port()
    relay = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.relay", str(port), str(setting.nginx.port), str(ONE_WAY)]
    )
    try:
        wait_for_port(port, relay)
        yield SlowPath(
            f"https://127.0.0.1:{port}/v1/upload",
            (),
            "round trip of 50 ms through a relay, without loss",
            netem=False,
        )
    finally:
        end(relay)


def _netem(name: str) -> bool:
    """Create a network namespace with a slow and lossy loopback interface; return whether that worked.

    Packets have the size of Ethernet packets, or each lost one would be 64 KiB.
    """
    if os.geteuid() != 0 or missing("ip", "tc") or not _ip("ip", "netns", "add", name):
        return False
    inside = ("ip", "netns", "exec", name)
    options = ["delay", f"{ONE_WAY * 1000:g}ms", "loss", "0.1%", "limit", "100000"]
    created = _ip(*inside, "ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1", "up") and _ip(
        *inside, "tc", "qdisc", "add", "dev", "lo", "root", "netem", *options
    )
    if not created:
        _ip("ip", "netns", "del", name)
    return created


def _ip(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
