"""Run the daemon through random schedules of network faults: each archive is delivered once and verified."""

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
from tests.faults.campaign import CampaignOptions, Report
from tests.faults.proxy import BELOW_HTTP, Fault, FaultProxy, Kind
from tests.programs import find
from tests.servers.nginx import Nginx
from tests.servers.process import a_listener
from tests.stage import Stage, until

_SIZES = (1, 2_000, 30_000, 400_000)
_SINGLE = 4 * 1024 * 1024 + 1
"""Bytes of an archive that a worker claims alone, so that each worker and its connection get one."""

_MAX_ROUNDS = 500
"""Rounds of such archives; each brings the remaining faults nearer."""

_MAX_AFTER = 800_000
"""Maximum number of bytes of a connection before its fault."""

_DESTINATION = """
timeout = {{ connect = "1s", read = "1s", write = "1s" }}
workers = {workers}
deadline = "{deadline}"
{more}
[destination.{name}.retry]
initial = "0.05s"
max = "0.2s"
"""

details = st.tuples(st.integers(0, _MAX_AFTER), st.integers(0, 3), st.sampled_from([1.0, 0.001]))


@st.composite
def schedules(draw: st.DrawFn, every: Sequence[Kind], times: int, seed: int) -> list[Fault]:
    """Draw every kind of fault so many times, in any order and with any details."""
    kinds = [*every] * times
    random.Random(seed).shuffle(kinds)  # hypothesis begins with the given order
    return [Fault(kind, *draw(details)) for kind in draw(st.permutations(kinds))]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a schedule; `sent_completely` is the maximum number of complete uploads of an archive."""

    archives: int
    injected: Counter[Kind]
    attempts_failed: int
    sent_completely: int

    @property
    def failed_without_fault(self) -> int:
        """Return how many attempts failed without a fault: a slow machine may cause time-outs of its own."""
        return max(self.attempts_failed - self.injected.total(), 0)


@dataclass(slots=True)
class NetworkTally:
    """The totals of all schedules."""

    schedules: int = 0
    in_http2: int = 0
    two_destinations: int = 0
    archives: int = 0
    seconds: float = 0.0
    seeds: list[int] = field(default_factory=list)
    injected: Counter[Kind] = field(default_factory=Counter)
    attempts_failed: int = 0


def deliver(
    base: Path,
    schedule: Sequence[Fault],
    count: int,
    *,
    query: bool,
    http2: bool = False,
    two_destinations: bool = False,
    sizes: Sequence[int] = _SIZES,
    workers: int = 3,
    deadline: str = "5s",
) -> Result:
    """Deliver `count` archives through a schedule of faults, and further ones until all faults were injected.

    With `query` the daemon may query the receiver for an archive. With `http2` the receiver is behind nginx,
    as it has no HTTP/2 itself. With `two_destinations` each archive goes to two receivers, with half of the
    faults for each.
    """
    stage = Stage(base)
    chance = random.Random(len(schedule) + count)
    digests: dict[str, str] = {}

    def put(size: int) -> None:
        name = f"sw-{len(digests):04}.tar.gz"
        content = b"%d " % len(digests) + os.urandom(size)
        digests[name] = hashlib.sha256(content).hexdigest()
        stage.put(name, content)

    names = ["vault", "annex"][: 1 + two_destinations]
    try:
        with ExitStack() as stack:
            proxies = [
                stack.enter_context(
                    _proxied_receiver(stage, name, schedule[number :: len(names)], http2=http2)
                )
                for number, name in enumerate(names)
            ]
            urls = [f"https://127.0.0.1:{proxy.port}/v1/upload" for proxy in proxies]
            options = [
                _DESTINATION.format(
                    name=name, workers=workers, deadline=deadline, more=_more(url, query, http2)
                )
                for name, url in zip(names, urls, strict=True)
            ]
            annex = stage.annex(urls[1], options[1]) if two_destinations else ""
            stage.configure(urls[0], drop='stable_for = "0s"', destination=options[0], more=annex)
            daemon = stage.daemon().ready()
            for _ in range(count):
                put(chance.choice(sizes))
            _wait_until_delivered(stage, proxies, digests)
            for _ in range(_MAX_ROUNDS):
                if all(proxy.is_done for proxy in proxies):
                    break
                for proxy in proxies:
                    proxy.close_clean_connections()
                for _ in range(workers):  # the next fault waits on the connection of one of them
                    put(_SINGLE)
                _wait_until_delivered(stage, proxies, digests)
            assert daemon.stop() == 0
            assert all(proxy.is_done for proxy in proxies), [proxy.remaining for proxy in proxies]
            injected = sum((proxy.injected for proxy in proxies), Counter[Kind]())
            assert injected == Counter(fault.kind for fault in schedule)
            _check(stage, digests, names)
            failed = daemon.count("attempt.failed")
            return Result(len(digests), injected, failed, _sent_completely(stage))
    finally:
        stage.end()


def _more(url: str, query: bool, http2: bool) -> str:
    lines = [f'query_url = "{url}/{{digest}}"'] if query else []
    return "\n".join([*lines, *(["http2 = true"] if http2 else [])])


@contextmanager
def _proxied_receiver(
    stage: Stage, name: str, schedule: Sequence[Fault], *, http2: bool
) -> Iterator[FaultProxy]:
    """Yield a proxy before a receiver that stores in the folder `name`."""
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
        location = f"client_max_body_size 0; location / {{ proxy_pass https://127.0.0.1:{port}; }}"
        with nginx.serving(f"{nginx.upstream_tls} {location}", http2=True):
            yield nginx.port
        assert nginx.protocols() == {"HTTP/2.0"}


def _wait_until_delivered(stage: Stage, proxies: Sequence[FaultProxy], digests: dict[str, str]) -> None:
    """Wait until all archives are delivered; have refusing proxies accept again after one refusal."""
    refused = 0

    def are_delivered() -> bool:
        nonlocal refused
        if any(proxy.is_refusing for proxy in proxies):
            seen = stage.log.read_bytes().count(b'"connect_failed"')
            if seen > refused:
                refused = seen
                for proxy in proxies:
                    proxy.accept_again()
        with closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=60)) as ledger:
            row = ledger.execute("SELECT count(*) FROM archive WHERE disposition = 'done'").fetchone()
        return int(row[0]) >= len(digests)

    until(are_delivered, "all archives", timeout=600)


def _sent_completely(stage: Stage) -> int:
    """Return the maximum number of attempts that sent one archive completely."""
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
        assert sorted(contents) == sorted(digests.values()), f"wrong archives at {destination}"
    with closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        rows = ledger.execute(
            "SELECT relpath, destination, archive.state, disposition, verified FROM archive"
            " JOIN delivery ON archive_id = archive.id"
        ).fetchall()
    both = [(name, destination) for name in names for destination in sorted(destinations)]
    assert sorted(rows) == [(name.encode(), to, "delivered", "done", 1) for name, to in both]
    lines = [json.loads(line) for line in stage.log.read_text(encoding="utf-8").splitlines()]
    logged = Counter(line["archive"] for line in lines if line["event"] == "archive.delivered")
    assert not [line for line in lines if line["event"] == "archive.rejected"]
    assert logged == dict.fromkeys(names, 1)


def run(seed: int, count: int, times: int, most: int, tally: NetworkTally, *, http2: bool = False) -> None:
    """Run the schedules of a seed: in the first, each fault comes as early as possible, then at any time."""
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
    @hypothesis.given(
        schedule=schedules(every, times, seed), query=st.booleans(), two_destinations=st.booleans()
    )
    def every_archive_arrives_once(schedule: list[Fault], query: bool, two_destinations: bool) -> None:
        began = time.monotonic()
        hypothesis.note(f"seed {seed}")
        with tempfile.TemporaryDirectory(prefix="backupd-network-") as base:
            result = deliver(
                Path(base), schedule, count, query=query, http2=http2, two_destinations=two_destinations
            )
        tally.schedules += 1
        tally.in_http2 += http2
        tally.two_destinations += two_destinations
        tally.archives += result.archives
        tally.injected += result.injected
        tally.attempts_failed += result.attempts_failed
        tally.seconds += time.monotonic() - began

    tally.seeds.append(seed)
    run_it: Callable[[], None] = every_archive_arrives_once
    run_it()


def campaign(options: CampaignOptions) -> Report:
    """Run two schedules of 500 archives for each seed, every third seed over HTTP/2, while there is time."""
    report, tally, seed = Report(), NetworkTally(), options.seed
    while not tally.seeds or options.has_time():
        http2 = seed % 3 == 2 and find("nginx") is not None
        try:
            run(seed, count=500, times=3, most=2, tally=tally, http2=http2)
        except Exception as error:  # noqa: BLE001 -- any failure is reported with its seed, and the next seed runs
            notes = "\n".join(getattr(error, "__notes__", ()))
            report.broken.append(f"seed {seed}: {error!r}\n{notes}")
        report.tried += 1
        seed += 1
    report.figures["schedules"] = f"{tally.schedules}, seeds {tally.seeds[0]} to {tally.seeds[-1]}"
    report.figures["over HTTP/2"] = f"{tally.in_http2} of these"
    report.figures["to two destinations"] = f"{tally.two_destinations} of these"
    report.figures["delivered"] = (
        f"{tally.archives} archives, each once, {tally.attempts_failed} attempts failed"
    )
    report.figures["faults"] = ", ".join(f"{n} x {kind.value}" for kind, n in tally.injected.items())
    return report
