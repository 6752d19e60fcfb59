"""P11 and P12: a daemon that Prometheus scrapes."""

from __future__ import annotations

import time
import urllib.request
from contextlib import ExitStack

from tests.bench.programs import Backupd, free_port, until
from tests.bench.resting import add_history
from tests.bench.setting import Setting
from tests.bench.table import Column, Goal, Row

_DAYS = 30


def metrics(setting: Setting) -> list[Row]:
    """P11: the time for a response; P12: the memory of an idle daemon with metrics and without."""
    devices, requests, seconds = (100, 20, 2) if setting.short else (1000, 200, 120)
    address = f"127.0.0.1:{free_port()}"
    url = f"http://{address}/metrics"
    names = ", ".join(f'"switch-{number:04}.example.net"' for number in range(devices))
    expect = f'{{ every = "1s", by = "{{stem}}", devices = [{names}] }}'
    scraped = setting.backupd(expect=expect, metrics=address)
    silent = setting.backupd(expect=expect)
    for backupd in (scraped, silent):
        add_history(backupd, devices * _DAYS, files=False)
    with ExitStack() as stack:
        for backupd in (scraped, silent):
            stack.enter_context(backupd.running())

        def all_are_overdue() -> bool:
            return _get(url)[1].count(b"backupd_drop_overdue{") >= devices

        until(all_are_overdue, "overdue devices", scraped.process, every=0.5)
        times = sorted(_get(url)[0] for _ in range(requests))
        size = len(_get(url)[1])
        with_metrics, without = _memory(scraped, silent, url, seconds)
    checked = not setting.short
    return [
        Row(
            "P11",
            f"GET /metrics with {devices} overdue devices, and {devices * _DAYS} archives in the ledger",
            [Column("backupd", "ms", times)],
            [Goal("p50 in ms", times[len(times) // 2], at_most=50, checked=checked)],
            [f"{requests} responses of {size / 1000:.0f} kB, one after the other, over plain HTTP"],
        ),
        Row(
            "P12",
            f"the same daemon for {seconds} s, with [metrics] and scraped every second, and without",
            [Column("with metrics", "MiB RSS", with_metrics), Column("without", "MiB RSS", without)],
            [Goal("MiB more", with_metrics[-1] - without[-1], at_most=8, checked=checked)],
        ),
    ]


def _get(url: str) -> tuple[float, bytes]:
    """Return the milliseconds of a request, with its connection, and the body of the response."""
    began = time.perf_counter()
    with urllib.request.urlopen(url, timeout=60) as response:
        body = response.read()
    return 1000 * (time.perf_counter() - began), body


def _memory(scraped: Backupd, silent: Backupd, url: str, seconds: int) -> tuple[list[float], list[float]]:
    """Return the memory of both daemons in each second of which one is scraped."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(seconds):
        _get(url)
        time.sleep(1)
        for backupd, found in zip((scraped, silent), samples, strict=True):
            found.append(backupd.memory("VmRSS"))
    return samples
