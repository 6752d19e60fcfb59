"""Random schedules of network faults over the whole daemon: every archive is delivered once, and verified."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults.campaign import Report, Terms
from tests.faults.proxy import BELOW_HTTP, Fault, FaultProxy, Kind
from tests.programs import find
from tests.servers.nginx import Nginx
from tests.servers.process import a_listener
from tests.stage import Stage, until

_SIZES = (1, 2_000, 30_000, 400_000)
_ALONE = 4 * 1024 * 1024 + 1
"""Bytes of an archive that a worker claims no other with: so each worker's connection gets some."""

_MOST_ROUNDS = 500
"""Of such archives; each brings a fault nearer to its time."""

_FURTHEST = 800_000
"""Bytes of a connection after which a fault strikes, at most."""

_DESTINATION = """
timeout = { connect = "1s", read = "1s", write = "1s", pool = "1s" }
"""
_RETRY = '[destination.vault.retry]\ninitial = "0.05s"\nmax = "0.2s"'

details = st.tuples(st.integers(0, _FURTHEST), st.integers(0, 3), st.sampled_from([1.0, 0.001]))


@st.composite
def schedules(draw: st.DrawFn, every: Sequence[Kind], times: int, seed: int) -> list[Fault]:
    """Draw every kind of fault so many times, in any order and with any detail."""
    kinds = [*every] * times
    random.Random(seed).shuffle(kinds)  # hypothesis begins with what is simplest: the order as it is given
    return [Fault(kind, *draw(details)) for kind in draw(st.permutations(kinds))]


@dataclass(frozen=True, slots=True)
class Course:
    """How a schedule went: what struck, the attempts that failed, how often one archive was sent whole."""

    archives: int
    struck: Counter[Kind]
    attempts_failed: int
    sent_whole: int


@dataclass(slots=True)
class Tally:
    """What was delivered under which faults."""

    schedules: int = 0
    in_http2: int = 0
    archives: int = 0
    seconds: float = 0.0
    seeds: list[int] = field(default_factory=list)
    struck: Counter[Kind] = field(default_factory=Counter)
    attempts_failed: int = 0


def deliver(
    base: Path,
    schedule: Sequence[Fault],
    count: int,
    *,
    asks: bool,
    http2: bool = False,
    sizes: Sequence[int] = _SIZES,
    workers: int = 3,
    deadline: str = "5s",
) -> Course:
    """Deliver archives through a schedule, more than `count` where it needs them to come to its end.

    With `asks` the daemon may ask the receiver whether it has an archive. With `http2` nginx stands before
    the receiver, which does not speak it.
    """
    stage = Stage(base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    chance = random.Random(len(schedule) + count)
    digests: dict[str, str] = {}

    def put(size: int) -> None:
        name = f"sw-{len(digests):04}.tar.gz"
        content = b"%d " % len(digests) + os.urandom(size)
        digests[name] = hashlib.sha256(content).hexdigest()
        stage.put(name, content)

    try:
        with (
            RunningReceiver(stage.store, tls) as receiver,
            _in_http2(stage, receiver.port) if http2 else nullcontext(receiver.port) as port,
            FaultProxy(stage.pki, port, schedule) as proxy,
        ):
            url = f"https://127.0.0.1:{proxy.port}/v1/upload"
            destination = f'workers = {workers}\ndeadline = "{deadline}"\n{_DESTINATION}'
            destination += f'query_url = "{url}/{{digest}}"\n' if asks else ""
            destination += "http2 = true" if http2 else ""
            stage.configure(url, drop='stable_for = "0s"', destination=destination, more=_RETRY)
            daemon = stage.daemon().ready()
            for _ in range(count):
                put(chance.choice(sizes))
            _settle(stage, proxy, digests)
            for _ in range(_MOST_ROUNDS):
                if proxy.is_over:
                    break
                proxy.end_clean()
                for _ in range(workers):  # the connection that a fault waits on is one of theirs
                    put(_ALONE)
                _settle(stage, proxy, digests)
            assert daemon.stop() == 0
            assert proxy.is_over, f"not every fault has struck: {proxy.left}"
            assert proxy.struck == Counter(fault.kind for fault in schedule)
            _check(stage, digests)
            failed = len(daemon.events("attempt.failed"))
            return Course(len(digests), proxy.struck, failed, _sent_whole(stage))
    finally:
        stage.end()


@contextmanager
def _in_http2(stage: Stage, port: int) -> Iterator[int]:
    with a_listener() as listener:
        nginx = Nginx(stage.base / "nginx", stage.pki, listener)
        passed_on = f"client_max_body_size 0; location / {{ proxy_pass https://127.0.0.1:{port}; }}"
        with nginx.serving(f"{nginx.upstream_tls} {passed_on}", http2=True):
            yield nginx.port
        assert nginx.protocols() == {"HTTP/2.0"}


def _settle(stage: Stage, proxy: FaultProxy, digests: dict[str, str]) -> None:
    """Wait until all is delivered; connections that are refused are taken again once one was."""
    refused = 0

    def settled() -> bool:
        nonlocal refused
        if proxy.is_refusing:
            seen = stage.log.read_bytes().count(b'"connect_failed"')
            if seen > refused:
                refused = seen
                proxy.take_again()
        with closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=60)) as ledger:
            row = ledger.execute("SELECT count(*) FROM archive WHERE disposition = 'done'").fetchone()
        return int(row[0]) >= len(digests)

    until(settled, "all archives", patience=600)


def _sent_whole(stage: Stage) -> int:
    """Return how many attempts brought the same archive whole to the wire, at most."""
    with closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        rows = ledger.execute(
            "SELECT count(*) FROM attempt JOIN delivery ON delivery_id = delivery.id"
            " WHERE sent >= size GROUP BY delivery_id"
        ).fetchall()
    return max(int(row[0]) for row in rows)


def _check(stage: Stage, digests: dict[str, str]) -> None:
    names = sorted(digests)
    assert not [path for path in stage.archives(stage.drop) if path.parent != stage.sent]
    assert [path.name for path in stage.archives(stage.sent)] == names
    for path in stage.archives(stage.sent):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digests[path.name]
    stored = [hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.stored()]
    assert sorted(stored) == sorted(digests.values()), "not each was stored, once"
    with closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        rows = ledger.execute(
            "SELECT relpath, archive.state, disposition, verified FROM archive"
            " JOIN delivery ON archive_id = archive.id"
        ).fetchall()
    assert sorted(rows) == [(name.encode(), "delivered", "done", 1) for name in names]
    lines = [json.loads(line) for line in stage.log.read_text(encoding="utf-8").splitlines()]
    told = Counter(line["archive"] for line in lines if line["event"] == "archive.delivered")
    assert not [line for line in lines if line["event"] == "archive.rejected"]
    assert told == dict.fromkeys(names, 1)


def run(seed: int, count: int, times: int, most: int, tally: Tally, *, http2: bool = False) -> None:
    """Run schedules that follow from a seed: in the first each fault strikes as early as it can, then any."""
    every = BELOW_HTTP if http2 else [*Kind]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(schedule=schedules(every, times, seed), asks=st.booleans())
    def every_archive_arrives_once(schedule: list[Fault], asks: bool) -> None:
        began = time.monotonic()
        hypothesis.note(f"seed {seed}")
        with tempfile.TemporaryDirectory(prefix="backupd-network-") as base:
            course = deliver(Path(base), schedule, count, asks=asks, http2=http2)
        tally.schedules += 1
        tally.in_http2 += http2
        tally.archives += course.archives
        tally.struck += course.struck
        tally.attempts_failed += course.attempts_failed
        tally.seconds += time.monotonic() - began

    tally.seeds.append(seed)
    run_it: Callable[[], None] = every_archive_arrives_once
    run_it()


def campaign(terms: Terms) -> Report:
    """Run schedules of 500 archives, two of each seed, of every third over HTTP/2, while there is time."""
    report, tally, seed = Report(), Tally(), terms.seed
    while not tally.seeds or terms.go_on():
        http2 = seed % 3 == 2 and find("nginx") is not None
        try:
            run(seed, count=500, times=3, most=2, tally=tally, http2=http2)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the seed has to be told, and the next tried
            notes = "\n".join(getattr(error, "__notes__", ()))
            report.broken.append(f"seed {seed}: {error!r}\n{notes}")
        report.tried += 1
        seed += 1
    report.figures["schedules"] = f"{tally.schedules}, seeds {tally.seeds[0]} to {tally.seeds[-1]}"
    report.figures["over HTTP/2"] = f"{tally.in_http2} of these"
    report.figures["delivered"] = (
        f"{tally.archives} archives, each once, {tally.attempts_failed} attempts failed"
    )
    report.figures["faults"] = ", ".join(f"{n} x {kind.value}" for kind, n in tally.struck.items())
    return report
