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
from contextlib import ExitStack, closing, contextmanager, nullcontext
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

_TERMS = """
timeout = {{ connect = "1s", read = "1s", write = "1s", pool = "1s" }}
workers = {workers}
deadline = "{deadline}"
{more}
[destination.{name}.retry]
initial = "0.05s"
max = "0.2s"
"""

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

    @property
    def failed_besides(self) -> int:
        """Return how many attempts failed without a fault: a machine that stands still ends one, too."""
        return max(self.attempts_failed - self.struck.total(), 0)


@dataclass(slots=True)
class Tally:
    """What was delivered under which faults."""

    schedules: int = 0
    in_http2: int = 0
    to_both: int = 0
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
    to_both: bool = False,
    sizes: Sequence[int] = _SIZES,
    workers: int = 3,
    deadline: str = "5s",
) -> Course:
    """Deliver archives through a schedule, more than `count` where it needs them to come to its end.

    With `asks` the daemon may ask the receiver whether it has an archive. With `http2` nginx stands before
    the receiver, which does not speak it. With `to_both` each archive goes to two receivers, and half of
    the faults lie in wait on the way to either.
    """
    stage = Stage(base)
    chance = random.Random(len(schedule) + count)
    digests: dict[str, str] = {}

    def put(size: int) -> None:
        name = f"sw-{len(digests):04}.tar.gz"
        content = b"%d " % len(digests) + os.urandom(size)
        digests[name] = hashlib.sha256(content).hexdigest()
        stage.put(name, content)

    names = ["vault", "annex"][: 1 + to_both]
    try:
        with ExitStack() as stack:
            proxies = [
                stack.enter_context(_way(stage, name, schedule[number :: len(names)], http2=http2))
                for number, name in enumerate(names)
            ]
            urls = [f"https://127.0.0.1:{proxy.port}/v1/upload" for proxy in proxies]
            terms = [
                _TERMS.format(name=name, workers=workers, deadline=deadline, more=_more(url, asks, http2))
                for name, url in zip(names, urls, strict=True)
            ]
            annex = stage.annex(urls[1], terms[1]) if to_both else ""
            stage.configure(urls[0], drop='stable_for = "0s"', destination=terms[0], more=annex)
            daemon = stage.daemon().ready()
            for _ in range(count):
                put(chance.choice(sizes))
            _settle(stage, proxies, digests)
            for _ in range(_MOST_ROUNDS):
                if all(proxy.is_over for proxy in proxies):
                    break
                for proxy in proxies:
                    proxy.end_clean()
                for _ in range(workers):  # the connection that a fault waits on is one of theirs
                    put(_ALONE)
                _settle(stage, proxies, digests)
            assert daemon.stop() == 0
            assert all(proxy.is_over for proxy in proxies), [proxy.left for proxy in proxies]
            struck = sum((proxy.struck for proxy in proxies), Counter[Kind]())
            assert struck == Counter(fault.kind for fault in schedule)
            _check(stage, digests, names)
            failed = len(daemon.events("attempt.failed"))
            return Course(len(digests), struck, failed, _sent_whole(stage))
    finally:
        stage.end()


def _more(url: str, asks: bool, http2: bool) -> str:
    lines = [f'query_url = "{url}/{{digest}}"'] if asks else []
    return "\n".join([*lines, *(["http2 = true"] if http2 else [])])


@contextmanager
def _way(stage: Stage, name: str, schedule: Sequence[Fault], *, http2: bool) -> Iterator[FaultProxy]:
    """Yield the way to a receiver of its own, which stores in the folder of that name."""
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    with (
        RunningReceiver(stage.base / name, tls) as receiver,
        _in_http2(stage, name, receiver.port) if http2 else nullcontext(receiver.port) as port,
        FaultProxy(stage.pki, port, schedule) as proxy,
    ):
        yield proxy


@contextmanager
def _in_http2(stage: Stage, name: str, port: int) -> Iterator[int]:
    with a_listener() as listener:
        nginx = Nginx(stage.base / f"nginx-{name}", stage.pki, listener)
        passed_on = f"client_max_body_size 0; location / {{ proxy_pass https://127.0.0.1:{port}; }}"
        with nginx.serving(f"{nginx.upstream_tls} {passed_on}", http2=True):
            yield nginx.port
        assert nginx.protocols() == {"HTTP/2.0"}


def _settle(stage: Stage, proxies: Sequence[FaultProxy], digests: dict[str, str]) -> None:
    """Wait until all is delivered; connections that are refused are taken again once one was."""
    refused = 0

    def settled() -> bool:
        nonlocal refused
        if any(proxy.is_refusing for proxy in proxies):
            seen = stage.log.read_bytes().count(b'"connect_failed"')
            if seen > refused:
                refused = seen
                for proxy in proxies:
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


def _check(stage: Stage, digests: dict[str, str], destinations: Sequence[str]) -> None:
    names = sorted(digests)
    assert not [path for path in stage.archives(stage.drop) if path.parent != stage.sent]
    assert [path.name for path in stage.archives(stage.sent)] == names
    for path in stage.archives(stage.sent):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digests[path.name]
    for destination in destinations:
        stored = stage.archives(stage.base / destination / "archives")
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in stored]
        assert sorted(contents) == sorted(digests.values()), f"not each was stored, once, at {destination}"
    with closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        rows = ledger.execute(
            "SELECT relpath, destination, archive.state, disposition, verified FROM archive"
            " JOIN delivery ON archive_id = archive.id"
        ).fetchall()
    both = [(name, destination) for name in names for destination in sorted(destinations)]
    assert sorted(rows) == [(name.encode(), to, "delivered", "done", 1) for name, to in both]
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
    @hypothesis.given(schedule=schedules(every, times, seed), asks=st.booleans(), to_both=st.booleans())
    def every_archive_arrives_once(schedule: list[Fault], asks: bool, to_both: bool) -> None:
        began = time.monotonic()
        hypothesis.note(f"seed {seed}")
        with tempfile.TemporaryDirectory(prefix="backupd-network-") as base:
            course = deliver(Path(base), schedule, count, asks=asks, http2=http2, to_both=to_both)
        tally.schedules += 1
        tally.in_http2 += http2
        tally.to_both += to_both
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
    report.figures["to two destinations"] = f"{tally.to_both} of these"
    report.figures["delivered"] = (
        f"{tally.archives} archives, each once, {tally.attempts_failed} attempts failed"
    )
    report.figures["faults"] = ", ".join(f"{n} x {kind.value}" for kind, n in tally.struck.items())
    return report
