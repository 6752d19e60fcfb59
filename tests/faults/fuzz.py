"""Random responses of endpoints, token endpoints and proxies: none is a false success, and none stays.

After each of them a well-behaved one gets its archive at the first attempt, by the same uploader.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hpack
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame

from backupd.core.model import Delivered, Digest, Outcome
from tests.endpoints import ScriptedProxy, json_response
from tests.faults.campaign import CampaignOptions, Report
from tests.http2_server import Exchange, Http2Server, http2_context
from tests.pki import Pki
from tests.scripted import (
    EndedError,
    Peer,
    Request,
    Script,
    ScriptedServer,
    header_of,
    http_response,
    receipt_for,
    server_context,
)
from tests.stage import until
from tests.uploading import Sender, a_destination, a_sender, an_archive

KINDS = ("HTTP/1.1", "HTTP/2", "token endpoint", "query_url", "proxy")

MAX_SECONDS = 60.0
"""Seconds after which an attempt counts as stuck: the server ends each connection at once."""

_TOKEN = "good"

_ROUND = 250
"""Cases with one server."""

_WRONG = receipt_for(b"another content")
_PIECES = [
    b"\r\n", b"\n", b"\r\n\r\n", b":", b" ", b"\t", b"\0", b"\xff", b"0", b"-1", b"99999999999999999999",
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 201 Created\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Content-Encoding: gzip\r\n", b"Connection: close\r\n", b"Location: http://127.0.0.1:1/\r\n",
    b"Retry-After: 0\r\n", b"0\r\n\r\n", b"ffffffff\r\n", b"{", b"}", b'"', b"null", b"[" * 500, b"\x1f\x8b",
]  # fmt: skip
"""Bytes that a mutation inserts."""


@dataclass(slots=True)
class Case:
    """Random bytes in place of a response, and when they are sent."""

    data: bytes
    after: str
    """The part of the request that is read before: `nothing`, `head`, `half`, `all`."""
    pieces: int = 1
    is_reset: bool = False


@dataclass(slots=True)
class Tally:
    """The number of outcomes, the faults that were found, and the seconds of the slowest attempt."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Return data after some random changes."""
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + int(chance.expovariate(0.1)))
        match chance.randrange(6):
            case 0:
                data = data[:at] + chance.choice(_PIECES) + data[at:]
            case 1:
                data = data[:at] + data[end:]
            case 2:
                data = data[:at] + data[at:end] * chance.randrange(2, 5) + data[end:]
            case 3:
                data = data[:at]
            case 4:
                data = data[:at] + chance.randbytes(chance.randrange(1, 5)) + data[at + 1 :]
            case 5:
                flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in data[at:end])
                data = data[:at] + flipped + data[end:]
    return data


def http1(chance: random.Random) -> bytes:
    """Return a response of HTTP/1.1 with the receipt for another content, before its mutation."""
    status = chance.choice((200, 201, 202, 204, 302, 400, 401, 404, 409, 413, 422, 429, 500, 503))
    body = chance.choice((b"", b"{}", _WRONG.partition(b"\r\n\r\n")[2], b"<html><h1>No</h1></html>"))
    chunked = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return chance.choice((_WRONG, http_response(status, body), chunked, b"HTTP/1.0 201 OK\r\n\r\n" + body))


def http2(chance: random.Random) -> bytes:
    """Return the frames of a response of HTTP/2 on the first stream, before their mutation."""
    body = chance.choice((b"", _WRONG.partition(b"\r\n\r\n")[2], chance.randbytes(50)))
    status = chance.choice(("201", "200", "400", "500", "100", "x"))
    fields = [(":status", status), ("content-type", "application/json"), ("content-length", str(len(body)))]
    frames: list[Frame] = [
        HeadersFrame(1, hpack.Encoder().encode(fields), flags=["END_HEADERS"]),
        DataFrame(1, body, flags=["END_STREAM"]),
        RstStreamFrame(1, error_code=chance.randrange(15)),
        GoAwayFrame(0, last_stream_id=chance.choice((0, 1, 7)), error_code=chance.randrange(3)),
        SettingsFrame(0, settings={4: chance.choice((0, 10, 2**31 - 1))}),
    ]
    if chance.random() < 0.3:
        chance.shuffle(frames)
    return b"".join(frame.serialize() for frame in frames[: chance.randrange(1, 6)])


def token(chance: random.Random) -> bytes:
    """Return a response of a token endpoint, before its mutation."""
    fields: dict[str, Any] = {"access_token": "t" * chance.randrange(30), "token_type": "Bearer"}
    fields["expires_in"] = chance.choice((0, 3600, -1, "300", None, 1e300))
    error = {"error": chance.choice(("invalid_client", 5, None)), "error_description": "no"}
    return json_response(chance.choice((fields, error, [], None)), chance.choice((200, 201, 400, 401, 500)))


def connected(chance: random.Random) -> bytes:
    """Return a response of a proxy to CONNECT, before its mutation."""
    status = chance.choice((b"200 OK", b"200 Connection established", b"407 No", b"502 No", b"302 No"))
    return b"HTTP/1.%d %s\r\nVia: a\r\n\r\n" % (chance.randrange(2), status)


_SOURCES: dict[str, Callable[[random.Random], bytes]] = {
    "HTTP/1.1": http1,
    "HTTP/2": http2,
    "token endpoint": token,
    "query_url": http1,
    "proxy": connected,
}


def a_case(chance: random.Random, kind: str) -> Case:
    """Return a random case."""
    after = chance.choice(("nothing", "head", "half", "all", "all", "all", "all"))
    data = mutated(chance, _SOURCES[kind](chance))
    if kind == "HTTP/2" and chance.random() < 0.9:  # else it responds before its settings
        data = SettingsFrame(0).serialize() + data
    return Case(data, after, chance.choice((1, 1, 2, len(data) or 1)), chance.random() < 0.1)


class Faulty:
    """A script that responds by `case` while that is set, and by another script otherwise."""

    def __init__(self, well_behaved: Script) -> None:
        self.case: Case | None = None
        self.running = 0
        """Connections on which the end of the bytes was not sent yet."""
        self._changing = threading.Lock()
        self._well_behaved = well_behaved

    def __call__(self, peer: Peer) -> None:
        case = self.case
        if case is None:
            self._well_behaved(peer)
            return
        with self._changing:
            self.running += 1
        try:
            with suppress(EndedError, OSError, ValueError):  # of a client that ends first, or no HTTP/1.1
                self._respond(peer, case)
        finally:
            with self._changing:
                self.running -= 1
        if not case.is_reset:
            with suppress(EndedError, OSError):
                peer.drain()

    def _respond(self, peer: Peer, case: Case) -> None:
        self._read(peer, case.after)
        size = -(-len(case.data) // case.pieces) or 1
        for start in range(0, len(case.data), size):
            peer.send(case.data[start : start + size])
        peer.reset() if case.is_reset else peer.half_close()

    @staticmethod
    def _read(peer: Peer, part: str) -> None:
        if part == "nothing":
            return
        head = peer.read_head()
        length = int(header_of(head, "content-length") or 0)
        peer.read({"head": 0, "half": length // 2, "all": length}[part])


class Http2Faulty(Faulty):
    """The same for HTTP/2, of which it reads only how much has arrived."""

    @staticmethod
    def _read(peer: Peer, part: str) -> None:
        if part != "nothing":
            peer.send(SettingsFrame(0).serialize())
            peer._piece()


class Store:
    """A well-behaved endpoint: stores what is sent with the token, if one is set, and knows nothing else."""

    def __init__(self, token: str = "") -> None:
        self.contents: set[bytes] = set()
        self._token = token

    def __call__(self, peer: Peer) -> None:
        while True:
            peer.send(self._respond(peer.read_request()))

    def _respond(self, request: Request) -> bytes:
        if request.head.startswith(b"GET"):
            return http_response(404)
        if self._token and request.header("authorization") != f"Bearer {self._token}":
            return http_response(401)
        self.contents.add(request.archive)
        return receipt_for(request.archive)


class Http2Store(Http2Server):
    """The same for HTTP/2."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def request_complete(self, exchange: Exchange) -> None:
        self._store.contents.add(self.archives[-1])
        super().request_complete(exchange)


def _issue_token(peer: Peer) -> None:
    while True:
        peer.read_request()
        peer.send(json_response({"access_token": _TOKEN, "token_type": "Bearer", "expires_in": 0}))


@contextmanager
def a_bench(kind: str, folder: Path, pki: Pki) -> Iterator[tuple[Sender, Faulty, Store]]:
    """Yield a sender, the script that gets the cases, and the endpoint that is asked in the end."""
    store = Store(_TOKEN if kind == "token endpoint" else "")
    with ExitStack() as stack:
        match kind:
            case "HTTP/2":
                faulty: Faulty = Http2Faulty(Http2Store(store))
                server = stack.enter_context(ScriptedServer(faulty, http2_context(pki)))
                destination = a_destination(server.url, pki, http2=True)
            case "token endpoint":
                secret = folder / "secret"
                secret.write_text("secret")
                faulty = Faulty(_issue_token)
                issuer = stack.enter_context(ScriptedServer(faulty))
                server = stack.enter_context(ScriptedServer(store))
                auth = {"token_url": issuer.url, "client_id": "me", "client_secret_file": secret}
                destination = a_destination(server.url, auth={"type": "oauth2", **auth})
            case "proxy":
                faulty = Faulty(ScriptedProxy())
                proxy = stack.enter_context(ScriptedServer(faulty))
                server = stack.enter_context(ScriptedServer(store, server_context(pki)))
                destination = a_destination(server.url, pki, proxy=f"http://127.0.0.1:{proxy.port}")
            case _:
                faulty = Faulty(store)
                server = stack.enter_context(ScriptedServer(faulty))
                query_url = f"{server.url}/{{digest}}" if kind == "query_url" else None
                destination = a_destination(server.url, query_url=query_url)
        yield stack.enter_context(a_sender(destination)), faulty, store


def fuzz(kind: str, seed: int, count: int, folder: Path) -> Tally:
    """Try so many random cases of a kind, each followed by an archive for a well-behaved endpoint."""
    tally, pki = Tally(), Pki(folder / "pki")
    for first in range(0, count, _ROUND):
        with a_bench(kind, folder, pki) as (sender, faulty, store):
            for number in range(first, min(first + _ROUND, count)):
                chance = random.Random(f"{seed} {kind} {number}")
                faulty.case = a_case(chance, kind)
                name = f"{kind}, seed {seed}, case {number}: {faulty.case}"
                sender.disconnect()
                if kind == "query_url":
                    sender.unconfirmed_digest = Digest("sha256", chance.randbytes(32).hex())
                outcome = _send(sender, chance, folder, store, name, tally)
                faulty.case = sender.unconfirmed_digest = None
                until(lambda: faulty.running == 0, "the end of the connections")
                tally.outcomes[type(outcome).__name__] += 1
                if not isinstance(good := _send(sender, chance, folder, store, name, tally), Delivered):
                    tally.faults.append(f"{name}: the next archive: {good}")
    return tally


def _send(
    sender: Sender, chance: random.Random, folder: Path, store: Store, name: str, tally: Tally
) -> Outcome | None:
    content = chance.randbytes(chance.choice((1, 100, 30_000)))
    began = time.monotonic()
    try:
        outcome = sender.send(an_archive(folder, content))
    except Exception as error:  # noqa: BLE001 -- the daemon would log a bug
        tally.faults.append(f"{name}: raised {error!r}")
        return None
    seconds = time.monotonic() - began
    tally.slowest = max(tally.slowest, seconds)
    if seconds > MAX_SECONDS:
        tally.faults.append(f"{name}: took {seconds:.0f} s")
    if isinstance(outcome, Delivered) and content not in store.contents:
        tally.faults.append(f"{name}: {outcome}, and nothing is stored")
    return outcome


def campaign(options: CampaignOptions) -> Report:
    """Try cases of every kind until the time is over."""
    report, number = Report(), 0
    tallies = {kind: Tally() for kind in KINDS}
    while options.has_time():
        for kind in KINDS:
            folder = options.base / f"{number}-{KINDS.index(kind)}"
            folder.mkdir()
            found, all_of_kind = fuzz(kind, options.seed + number, _ROUND, folder), tallies[kind]
            report.tried += _ROUND
            report.broken += found.faults
            all_of_kind.outcomes += found.outcomes
            all_of_kind.slowest = max(all_of_kind.slowest, found.slowest)
        number += 1
    for kind, tally in tallies.items():
        report.figures[kind] = f"{dict(tally.outcomes)}, the slowest {tally.slowest:.1f} s"
    report.figures["seeds"] = f"{options.seed} to {options.seed + number - 1}"
    return report
