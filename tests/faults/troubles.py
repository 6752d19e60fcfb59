"""Lasting troubles of many kinds: what the daemon costs meanwhile, how much it logs, and that it recovers."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.endpoints import a_full_listener
from tests.faults.campaign import CampaignOptions, Report
from tests.faults.disk import a_disk, a_small_disk, fill
from tests.scripted import Peer, ScriptedServer, http_response, receipt_for, server_context
from tests.stage import Daemon, Stage, a_stage, until

MAX_AVERAGE, MAX_FIVE_SECONDS = 0.01, 0.03
"""The largest part of a core that the daemon may use on average, and in any five seconds."""

MAX_LINES = 30
"""The most lines that the daemon may log in a minute."""

REFUSED = "every archive refused"
"""A trouble after which some archives have to be sent again by a command."""

SECONDS = 120.0
"""Seconds for which a trouble is measured."""

_RECOVERY = 1800.0
"""Seconds in which all archives have to be delivered after the end of a trouble."""

_TICKS = os.sysconf("SC_CLK_TCK")

_SIGN_IN = """
[destination.vault.auth]
type = "oauth2"
token_url = "https://127.0.0.1:%d/token"
client_id = "me"
client_secret_file = "%s"
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """The parts of a core on average and in the worst five seconds, and the lines logged in a minute."""

    average: float
    five_seconds: float
    lines: float
    events: Counter[str]
    recovery: float = 0.0

    def __str__(self) -> str:
        return (
            f"{100 * self.average:.2f} % of a core, {100 * self.five_seconds:.1f} % in 5 s,"
            f" {self.lines:.0f} lines a minute, recovery {self.recovery:.1f} s"
        )


class Endpoint:
    """A script that takes archives, or responds by `respond` while that is set."""

    def __init__(self, respond: Callable[[Peer, bytes], None] | None = None) -> None:
        self.respond = respond

    def __call__(self, peer: Peer) -> None:
        while True:
            content = peer.read_request().archive
            if self.respond is None:
                peer.send(receipt_for(content))
            else:
                self.respond(peer, content)


def responds(status: int, **headers: str) -> Callable[[Peer, bytes], None]:
    response = http_response(status, b"", **headers)
    return lambda peer, _content: peer.send(response)


def put_all(stage: Stage, count: int) -> None:
    for number in range(count):
        stage.put(f"sw-{number}.cfg", b"%d" % number)


Trouble = Callable[[Stage, int], AbstractContextManager[tuple[Daemon, Callable[[], None]]]]
"""Yields a daemon that has the trouble with so many archives, and a function that ends the trouble."""


def started(stage: Stage, count: int, sign: str = "destination.paused") -> Daemon:
    """Start the daemon with archives in the folder, and wait until it knows them and has the trouble."""
    put_all(stage, count)
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.queued", count)
    daemon.wait_for(sign)
    return daemon


def of_responses(respond: Callable[[Peer, bytes], None], sign: str = "destination.paused") -> Trouble:
    @contextmanager
    def trouble(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
        endpoint = Endpoint(respond)
        with ScriptedServer(endpoint, server_context(stage.pki)) as server:
            stage.configure(server.url)
            yield started(stage, count, sign), lambda: setattr(endpoint, "respond", None)

    return trouble


@contextmanager
def destination_down(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    with ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure(server.url)
        server.refuse()
        yield started(stage, count), server.accept_again


@contextmanager
def destination_silent(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    with a_full_listener() as port, ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure(f"https://127.0.0.1:{port}/", destination='timeout.connect = "1s"')
        daemon = started(stage, count)
        yield daemon, lambda: _reconfigured(stage, daemon, server.url)


def _reconfigured(stage: Stage, daemon: Daemon, url: str) -> None:
    stage.configure(url)
    daemon.process.send_signal(1)
    daemon.wait_for("config.reloaded")


@contextmanager
def unknown_name(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    with ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure("https://unknown.invalid/")
        daemon = started(stage, count)
        yield daemon, lambda: _reconfigured(stage, daemon, server.url)


@contextmanager
def untrusted(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    context = server_context(stage.pki, stage.pki.issue_server("other", ("vault.test",)))
    with ScriptedServer(Endpoint(), context) as server:
        stage.configure(server.url)
        yield (
            started(stage, count),
            lambda: context.load_cert_chain(stage.pki.server_cert, stage.pki.server_key),
        )


@contextmanager
def proxy_down(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    with ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure(server.url, destination=f'proxy = "http://127.0.0.1:{stage.a_free_port()}"')
        daemon = started(stage, count)
        yield daemon, lambda: _reconfigured(stage, daemon, server.url)


@contextmanager
def token_endpoint_down(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    secret = stage.base / "secret"
    secret.write_text("secret")
    with ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure(server.url, more=_SIGN_IN % (stage.a_free_port(), secret))
        daemon = started(stage, count)
        yield daemon, lambda: _reconfigured(stage, daemon, server.url)


Fault = Callable[[], AbstractContextManager[None]]


@contextmanager
def _with_a_failing_ledger(
    stage: Stage, count: int, fault: Fault, *, arrive_later: bool = False
) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    """Begin the fault while the archives are pending, or before they arrive; the destination works then."""
    with (
        ScriptedServer(Endpoint(), server_context(stage.pki)) as server,
        ExitStack() as faults,
    ):
        stage.configure(server.url, destination='retry = { initial = "1s", max = "1s" }')
        if arrive_later:
            daemon = stage.daemon().ready()
            faults.enter_context(fault())
            put_all(stage, count)
        else:
            server.refuse()
            daemon = started(stage, count)
            faults.enter_context(fault())
            server.accept_again()
        daemon.wait_for("ledger.failed")
        yield daemon, faults.close


@contextmanager
def _locked(stage: Stage) -> Iterator[None]:
    with closing(sqlite3.connect(stage.state / "ledger.sqlite3", check_same_thread=False)) as ledger:
        until(lambda: _begun(ledger), "the lock")
        yield


def _begun(ledger: sqlite3.Connection) -> bool:
    try:
        ledger.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True


@contextmanager
def _full(stage: Stage) -> Iterator[None]:
    filler = fill(stage.state / "filler")
    yield
    filler.unlink()


def ledger_locked(*, arrive_later: bool) -> Trouble:
    @contextmanager
    def trouble(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
        fault = partial(_locked, stage)
        with _with_a_failing_ledger(stage, count, fault, arrive_later=arrive_later) as running:
            yield running

    return trouble


def ledger_full(*, arrive_later: bool) -> Trouble:
    @contextmanager
    def trouble(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
        fault = partial(_full, stage)
        with (
            a_small_disk(stage.state, "32m"),
            _with_a_failing_ledger(stage, count, fault, arrive_later=arrive_later) as running,
        ):
            yield running

    return trouble


@contextmanager
def ledger_read_only(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    """As the kernel makes a filesystem after an error of the disk; it ends with a restart."""
    stage.state.mkdir()
    with a_disk(stage.base / "image", stage.state) as disk:

        @contextmanager
        def read_only() -> Iterator[None]:
            subprocess.run(["mount", "-o", "remount,abort", stage.state], check=True)
            yield

        with _with_a_failing_ledger(stage, count, read_only) as (daemon, _):

            def restart() -> None:
                daemon.kill()
                disk.power_on()
                stage.daemon()

            yield daemon, restart


@contextmanager
def drop_gone(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    with ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "5s"')
        server.refuse()
        daemon = started(stage, count)
        away = stage.base / "away"
        stage.drop.rename(away)
        server.accept_again()
        daemon.wait_for("drop.failed")
        yield daemon, lambda: os.rename(away, stage.drop)


@contextmanager
def not_moved(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    with ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure(server.url, destination='retry = { initial = "1s", max = "1s" }')
        server.refuse()
        daemon = started(stage, count)
        stage.sent.write_bytes(b"in place of the folder")
        server.accept_again()
        daemon.wait_for("delivery.verified", count)
        yield daemon, stage.sent.unlink


@contextmanager
def checksum_missing(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    with ScriptedServer(Endpoint(), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='checksum_file = "required"')
        put_all(stage, count)
        daemon = stage.daemon().ready()

        def heal() -> None:
            stage.configure(server.url)
            daemon.process.send_signal(1)

        until(lambda: _listed_problems(stage) == count, "all files to be listed")
        yield daemon, heal


def _listed_problems(stage: Stage) -> int:
    status = json.loads(stage.backupd("status", "--json").stdout)
    return sum(problem["files"] for problem in status["problems"])


@contextmanager
def no_response(stage: Stage, count: int) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    endpoint = Endpoint(lambda peer, _content: peer.drain())
    with ScriptedServer(endpoint, server_context(stage.pki)) as server:
        stage.configure(server.url, destination='timeout = { connect = "10m", read = "2s" }')
        yield started(stage, count), lambda: setattr(endpoint, "respond", None)


def lost(peer: Peer, _content: bytes) -> None:
    """Close the connection after the whole archive."""
    peer.close()


def reset(peer: Peer, _content: bytes) -> None:
    peer.reset()


TROUBLES: dict[str, Trouble] = {
    "destination down": destination_down,
    "destination silent": destination_silent,
    "unknown host name": unknown_name,
    "untrusted certificate": untrusted,
    "forbidden": of_responses(responds(403)),
    REFUSED: of_responses(responds(422)),
    "rate limited": of_responses(responds(429)),
    "rate limited, Retry-After 1": of_responses(responds(429, Retry_After="1")),
    "unavailable, Retry-After 0": of_responses(responds(503, Retry_After="0")),
    "answer unknown": of_responses(lost),
    "connection reset": of_responses(reset),
    "no response": no_response,
    "no receipt": of_responses(responds(201), "attempt.failed"),
    "proxy down": proxy_down,
    "token endpoint down": token_endpoint_down,
    "ledger locked": ledger_locked(arrive_later=False),
    "ledger locked while archives arrive": ledger_locked(arrive_later=True),
    "ledger full": ledger_full(arrive_later=False),
    "ledger full while archives arrive": ledger_full(arrive_later=True),
    "ledger read-only": ledger_read_only,
    "drop folder gone": drop_gone,
    "files that cannot be moved": not_moved,
    "checksum files missing": checksum_missing,
}


def measure(daemon: Daemon, seconds: float) -> Cost:
    """Measure the daemon for so many seconds."""
    began, known, cpu = time.monotonic(), len(daemon.events()), [_cpu_seconds(daemon)]
    while time.monotonic() < began + seconds:
        time.sleep(1)
        cpu.append(_cpu_seconds(daemon))
    spent = time.monotonic() - began
    events = Counter(event["event"] for event in daemon.events()[known:])
    worst = max(later - earlier for earlier, later in zip(cpu, cpu[5:], strict=False))
    return Cost((cpu[-1] - cpu[0]) / spent, worst / 5, 60 * events.total() / spent, events)


def _cpu_seconds(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def cost_of(name: str, count: int, folder: Path, seconds: float) -> Cost:
    """Return what a trouble with so many archives costs, and how long the deliveries took after its end."""
    folder.mkdir()
    with contextmanager(a_stage)(folder) as stage, TROUBLES[name](stage, count) as (daemon, end):
        cost = measure(daemon, seconds)
        end()
        ended = time.monotonic()
        if name == REFUSED:
            stage.backupd("retry", "--all")
        until(lambda: len(stage.archives(stage.sent)) == count, f"{count} archives after {name}", _RECOVERY)
        return replace(cost, recovery=time.monotonic() - ended)


def costs(counts: Sequence[int], folder: Path, seconds: float) -> dict[tuple[str, int], Cost]:
    """Return the cost of each trouble with each number of archives; all are measured at the same time."""
    cases = [(name, count) for count in counts for name in TROUBLES if name != REFUSED or count > 3]
    with ThreadPoolExecutor(len(cases)) as pool:
        running = {
            case: pool.submit(cost_of, *case, folder / str(number), seconds)
            for number, case in enumerate(cases)
        }
        return {case: future.result() for case, future in running.items()}


def too_much(cost: Cost) -> list[str]:
    """Return which bounds a cost exceeds."""
    found = []
    if cost.average > MAX_AVERAGE or cost.five_seconds > MAX_FIVE_SECONDS:
        found.append("too much of a core")
    if cost.lines > MAX_LINES:
        found.append(f"too many lines: {dict(cost.events)}")
    return found


def campaign(options: CampaignOptions) -> Report:
    """Measure every trouble for two minutes, with 1 and with 1,000 archives."""
    report = Report()
    for count in (1, 1000):
        folder = options.base / str(count)
        folder.mkdir()
        for (name, _), cost in costs([count], folder, SECONDS).items():
            report.tried += 1
            report.figures[f"{name}, {count}"] = str(cost)
            report.broken += [f"{name}, {count}: {fault}" for fault in too_much(cost)]
    return report
