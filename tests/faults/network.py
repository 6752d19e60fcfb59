"""Random schedules of network faults over the whole daemon: every archive is delivered once, and verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults.campaign import Report, Terms
from tests.faults.proxy import Fault, FaultProxy, Kind
from tests.stage import Stage, until

_SIZES = (1, 2_000, 30_000, 400_000)
_FURTHEST = 800_000
"""Bytes of a connection after which a fault strikes, at most."""

_DESTINATION = """
workers = 3
timeout = { connect = "1s", read = "1s", write = "1s", pool = "1s" }
deadline = "5s"
"""
_RETRY = '[destination.vault.retry]\ninitial = "0.05s"\nmax = "0.2s"'

details = st.tuples(st.integers(0, _FURTHEST), st.integers(0, 3))


@st.composite
def schedules(draw: st.DrawFn, times: int) -> list[Fault]:
    """Draw every kind of fault so many times, in any order and with any detail."""
    kinds = draw(st.permutations([*Kind] * times))
    return [Fault(kind, *draw(details)) for kind in kinds]


@dataclass(slots=True)
class Tally:
    """What was delivered under which faults."""

    schedules: int = 0
    archives: int = 0
    seconds: float = 0.0
    seeds: list[int] = field(default_factory=list)
    struck: Counter[Kind] = field(default_factory=Counter)
    attempts_failed: int = 0


def deliver(
    base: Path, schedule: list[Fault], count: int, *, asks: bool, sizes: Sequence[int] = _SIZES
) -> tuple[Counter[Kind], int]:
    """Deliver archives through a schedule; return what struck, and how many attempts failed.

    With `asks` the daemon may ask the receiver whether it has an archive.
    """
    stage = Stage(base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    chance = random.Random(len(schedule) + count)
    try:
        with (
            RunningReceiver(stage.store, tls) as receiver,
            FaultProxy(stage.pki, receiver.port, schedule) as proxy,
        ):
            url = f"https://127.0.0.1:{proxy.port}/v1/upload"
            query = f'query_url = "{url}/{{digest}}"' if asks else ""
            stage.configure(url, drop='stable_for = "0s"', destination=_DESTINATION + query, more=_RETRY)
            daemon = stage.daemon().ready()
            digests = {}
            for number in range(count):
                name = f"sw-{number:04}.tar.gz"
                content = b"%d " % number + os.urandom(chance.choice(sizes))
                digests[name] = hashlib.sha256(content).hexdigest()
                stage.put(name, content)
            _settle(stage, proxy, count)
            assert daemon.stop() == 0
            _check(stage, digests)
            return proxy.struck, len(daemon.events("attempt.failed"))
    finally:
        stage.end()


def _settle(stage: Stage, proxy: FaultProxy, count: int) -> None:
    """Wait until all is delivered; a connection that lives on must not keep a fault from its turn."""

    def settled() -> bool:
        with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=60)) as ledger:
            row = ledger.execute("SELECT count(*) FROM archive WHERE disposition = 'done'").fetchone()
        return int(row[0]) >= count

    until(settled, "all archives", patience=600)


def _check(stage: Stage, digests: dict[str, str]) -> None:
    names = sorted(digests)
    assert sorted(path.name for path in stage.archives(stage.drop)) == names
    for path in stage.archives(stage.sent):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digests[path.name]
    stored = [hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.stored()]
    assert sorted(stored) == sorted(digests.values()), "not each was stored, once"
    with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        rows = ledger.execute(
            "SELECT relpath, archive.state, disposition, verified FROM archive"
            " JOIN delivery ON archive_id = archive.id"
        ).fetchall()
    assert sorted(rows) == [(name.encode(), "delivered", "done", 1) for name in names]
    lines = [json.loads(line) for line in stage.log.read_text(encoding="utf-8").splitlines()]
    told = Counter(line["archive"] for line in lines if line["event"] == "archive.delivered")
    assert not [line for line in lines if line["event"] == "archive.rejected"]
    assert told == dict.fromkeys(names, 1)


def run(seed: int, count: int, times: int, most: int, tally: Tally) -> None:
    """Run schedules that follow from a seed: the first has every fault in its order, then any."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(schedule=schedules(times), asks=st.booleans())
    def every_archive_arrives_once(schedule: list[Fault], asks: bool) -> None:
        began = time.monotonic()
        hypothesis.note(f"seed {seed}")
        with tempfile.TemporaryDirectory(prefix="backupd-network-") as base:
            struck, failed = deliver(Path(base), schedule, count, asks=asks)
        tally.schedules += 1
        tally.archives += count
        tally.struck += struck
        tally.attempts_failed += failed
        tally.seconds += time.monotonic() - began

    tally.seeds.append(seed)
    run_it: Callable[[], None] = every_archive_arrives_once
    run_it()


def campaign(terms: Terms) -> Report:
    """Run schedules of 500 archives, two of each seed, for as long as there is time."""
    report, tally, seed = Report(), Tally(), terms.seed
    while not tally.seeds or terms.go_on():
        try:
            run(seed, count=500, times=3, most=2, tally=tally)
        except AssertionError as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            report.broken.append(f"seed {seed}: {error}\n{notes}")
        report.tried += 1
        seed += 1
    report.figures["schedules"] = f"{tally.schedules}, seeds {tally.seeds[0]} to {tally.seeds[-1]}"
    report.figures["delivered"] = (
        f"{tally.archives} archives, each once, {tally.attempts_failed} attempts failed"
    )
    report.figures["faults"] = ", ".join(f"{n} x {kind.value}" for kind, n in tally.struck.items())
    return report
