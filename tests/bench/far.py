"""P9: a destination that is 50 ms away."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.ends import Nginx, Ours, curl, curl_each, end, free_port, missing, wait_for_port
from tests.bench.setting import Setting, large, warm
from tests.bench.table import BrokenError, Claim, Column, Figures, Race, Row

ONE_WAY = 0.025


@dataclass
class Way:
    """A way to the endpoint: where it ends, what puts a process at its beginning, and what it is."""

    url: str
    prefix: Sequence[str]
    what: str
    netem: bool


def far(setting: Setting) -> list[Row]:
    """P9: one larger archive and many small ones."""
    mib, count = (4, 20) if setting.short else (64, 200)
    smalls = setting.small(count)
    archive = setting.folder()
    archive.mkdir()
    archive /= "far.tar.gz"
    large(archive, mib)
    pki = setting.pki
    with _way(setting) as way:
        ours = Ours(setting.folder(), pki, way.url, prefix=way.prefix)

        def ours_large() -> Figures:
            return {"s": _deliver(ours, [archive])}

        def ours_small() -> Figures:
            return {"files/s": count / _deliver(ours, smalls)}

        def curl_large() -> Figures:
            warm(archive)
            return {"s": curl(pki, way.url, archive, way.prefix)[0]}

        def curl_small() -> Figures:
            return {"files/s": count / curl_each(pki, way.url, smalls, way.prefix)}

        with ours.running():
            one = Race(setting.runs, {"ours": ours_large, "curl": missing("curl") or curl_large})
            each = "curl, a process for each"
            all_of_them = Race(
                setting.runs, {"ours": ours_small, each: missing("curl", "xargs") or curl_small}
            )
    os.unlink(archive)
    judged = not setting.short
    columns = one.columns("s") + all_of_them.columns("files/s")
    if not way.netem:
        why = "needs root, ip, tc and the kernel's netem"
        columns.append(Column("the same with 0.1 % loss", "s", skipped=why))
    return [
        Row(
            "P9",
            f"{way.what}: one archive of {mib} MiB, and {count} of 20 kB",
            columns,
            [
                Claim(
                    "one archive: ours / curl",
                    one.ratio("s", "ours", "curl"),
                    at_most=1.1,
                    judged=judged and way.netem,
                ),
                Claim(
                    "small ones: ours / curl",
                    all_of_them.ratio("files/s", "ours", each),
                    at_least=5,
                    judged=judged,
                ),
            ],
        )
    ]


def _deliver(ours: Ours, archives: list[Path]) -> float:
    warm(*archives)
    done = ours.count("archive.disposed")
    start = time.perf_counter()
    for archive in archives:
        os.rename(archive, ours.drop / archive.name)
    ours.wait_settled(done + len(archives))
    seconds = time.perf_counter() - start
    if ours.take_back(archives[0].parent) != archives:
        raise BrokenError("the archives are not in sent/")
    return seconds


@contextmanager
def _way(setting: Setting) -> Iterator[Way]:
    name = f"bench{os.getpid()}"
    if _netem(name):
        try:
            prefix = ("ip", "netns", "exec", name)
            nginx = Nginx(setting.folder(), setting.pki, prefix)
            try:
                yield Way(nginx.url, prefix, "50 ms away with 0.1 % loss (netem)", netem=True)
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
        yield Way(
            f"https://127.0.0.1:{port}/v1/upload",
            (),
            "50 ms away by a relay, delay without loss",
            netem=False,
        )
    finally:
        end(relay)


def _netem(name: str) -> bool:
    """Make a network namespace whose loopback interface is slow and lossy; tell whether that can be done.

    Packets have the size that they have on Ethernet, or each lost one would be 64 KiB.
    """
    if os.geteuid() != 0 or missing("ip", "tc") or not _ip("ip", "netns", "add", name):
        return False
    inside = ("ip", "netns", "exec", name)
    how = ["delay", f"{ONE_WAY * 1000:g}ms", "loss", "0.1%", "limit", "100000"]
    made = _ip(*inside, "ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1", "up") and _ip(
        *inside, "tc", "qdisc", "add", "dev", "lo", "root", "netem", *how
    )
    if not made:
        _ip("ip", "netns", "del", name)
    return made


def _ip(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
