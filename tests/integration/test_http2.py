"""HTTP/2: what an endpoint may say at any time, and what it can't do to us by it."""

from __future__ import annotations

import hashlib
import os
import select
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame

from backupd.core.model import Deferred, Delivered, Outcome, Rejected, Superseded
from backupd.core.policy import Reason
from backupd.upload.http import limits
from backupd.upload.http.limits import AttemptLimits
from backupd.upload.http.stream import TlsSocket
from tests.pki import Pki
from tests.scripted import EndedError, Peer, Request, ScriptedServer, accept_all, receipt_for, server_context
from tests.stage import TIMEOUT, Stage, until
from tests.uploading import MIB, a_destination, a_sender, an_archive

CONTENT = b"the content of an archive" * 1000
QUICK = 'retry = { initial = "0.1s", max = "0.3s" }'
WINDOW = 65_535
"""Bytes that may be sent before the other side has opened the window further."""


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def http2_context(pki: Pki) -> ssl.SSLContext:
    context = server_context(pki)
    context.set_alpn_protocols(["h2"])
    return context


def failed(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Deferred), outcome
    return outcome.reason


@dataclass
class Talk:
    """A connection as an endpoint has it, and the request on it."""

    peer: Peer
    connection: h2.connection.H2Connection
    stream: int = 0
    head: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    def flush(self) -> None:
        self.peer.send(self.connection.data_to_send())

    def send(self, *frames: Frame) -> None:
        """Send what the library would not."""
        self.flush()
        self.peer.send(b"".join(frame.serialize() for frame in frames))

    def answer(self, *fields: tuple[str, str], end: bool = False) -> None:
        self.connection.send_headers(self.stream, fields, end_stream=end)

    @property
    def archive(self) -> bytes:
        head = f"POST / HTTP/1.1\r\nContent-Type: {self.head['content-type']}"
        return Request(head.encode(), bytes(self.body)).archive


class Endpoint:
    """An endpoint that takes archives; `archives` are what it was sent."""

    def __init__(self) -> None:
        self.archives: list[bytes] = []
        self.heads: list[dict[str, str]] = []
        self.connections = 0

    def __call__(self, peer: Peer) -> None:
        self.connections += 1
        config = h2.config.H2Configuration(client_side=False, validate_outbound_headers=False)
        talk = Talk(peer, h2.connection.H2Connection(config))
        talk.connection.initiate_connection()
        self.begun(talk)
        while True:
            talk.flush()
            for event in talk.connection.receive_data(peer._piece()):
                self.heard(talk, event)

    def begun(self, talk: Talk) -> None:
        """Do nothing."""

    def heard(self, talk: Talk, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            talk.stream, talk.body = event.stream_id, bytearray()
            talk.head = {name.decode(): value.decode() for name, value in event.headers}
            self.heads.append(talk.head)
            self.asked(talk)
        elif isinstance(event, h2.events.DataReceived):
            talk.body += event.data
            self.given(talk, event.flow_controlled_length)
        elif isinstance(event, h2.events.StreamEnded):
            self.archives.append(talk.archive)
            self.has_all(talk)

    def asked(self, talk: Talk) -> None:
        """Do nothing."""

    def given(self, talk: Talk, size: int) -> None:
        talk.connection.acknowledge_received_data(size, talk.stream)

    def has_all(self, talk: Talk) -> None:
        receipt = receipt_for(self.archives[-1]).partition(b"\r\n\r\n")[2]
        talk.answer((":status", "201"), ("content-length", str(len(receipt))))
        talk.connection.send_data(talk.stream, receipt, end_stream=True)


def assert_takes(endpoint: Endpoint, contents: list[bytes], folder: Path, pki: Pki) -> None:
    """Assert that an endpoint gets each of some archives at the first attempt."""
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            outcomes = [sender.send(an_archive(folder, content)) for content in contents]
    assert all(isinstance(outcome, Delivered) for outcome in outcomes), outcomes
    assert endpoint.archives == contents


def test_archives_of_all_sizes_go_over_one_connection(tmp_path: Path, pki: Pki) -> None:
    endpoint = Endpoint()
    contents = [b"", b"x", os.urandom(100_000), os.urandom(5 * MIB)]
    assert_takes(endpoint, contents, tmp_path, pki)
    assert endpoint.connections == 1
    assert {head[":method"] for head in endpoint.heads} == {"POST"}
    assert {head["idempotency-key"] for head in endpoint.heads} == {"the-delivery"}


def test_an_endpoint_without_it_is_spoken_to_in_http_1(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(accept_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert server.requests[0].head.startswith(b"POST /v1/upload HTTP/1.1\r\n")


def test_it_is_not_spoken_unless_asked_for(tmp_path: Path, pki: Pki) -> None:
    context = server_context(pki)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with ScriptedServer(accept_all, context) as server:
        with a_sender(a_destination(server.url, pki)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


def test_many_archives_go_through_the_daemon(stage: Stage) -> None:
    endpoint = Endpoint()
    with ScriptedServer(endpoint, http2_context(stage.pki)) as server:
        stage.configure(server.url, destination="http2 = true\nworkers = 4")
        contents = {f"{number}.tar.gz": os.urandom(50_000) for number in range(100)}
        for name, content in contents.items():
            stage.put(name, content)
        daemon = stage.daemon()
        daemon.wait_for("archive.disposed", count=100)
        assert not daemon.events("attempt.failed")
        assert daemon.stop() == 0
    assert sorted(endpoint.archives) == sorted(contents.values())
    assert endpoint.connections <= 4


# The end of a connection


@pytest.mark.parametrize("warnings", [0, 1], ids=["at once", "after a warning"])
def test_a_goaway_lets_the_archive_under_way_end(tmp_path: Path, pki: Pki, warnings: int) -> None:
    class Leaving(Endpoint):
        def asked(self, talk: Talk) -> None:
            lasts = [2**31 - 1] * warnings + [talk.stream]
            talk.send(*(GoAwayFrame(0, last_stream_id=last) for last in lasts))

    endpoint, contents = Leaving(), [os.urandom(MIB) for _ in range(3)]
    assert_takes(endpoint, contents, tmp_path, pki)
    assert endpoint.connections == 3


def test_what_met_a_goaway_on_its_way_is_sent_at_once_on_another_connection(tmp_path: Path, pki: Pki) -> None:
    class OneEach(Endpoint):
        def asked(self, talk: Talk) -> None:
            if talk.stream > 1:
                talk.send(GoAwayFrame(0, last_stream_id=1))

    endpoint, contents = OneEach(), [os.urandom(MIB) for _ in range(3)]
    assert_takes(endpoint, contents, tmp_path, pki)
    assert endpoint.connections == 3


@pytest.mark.parametrize("code", [0, 2])
def test_a_goaway_in_the_middle_of_an_answer_leaves_open_whether_it_arrived(
    tmp_path: Path, pki: Pki, code: int
) -> None:
    class Fickle(Endpoint):
        def has_all(self, talk: Talk) -> None:
            if talk.stream == 1:
                super().has_all(talk)
                return
            talk.answer((":status", "201"), ("content-length", "100"))
            talk.connection.send_data(talk.stream, b"a part")
            talk.flush()
            server.stopping.wait(0.2)  # for the answer's beginning to be heard by itself
            talk.send(GoAwayFrame(0, last_stream_id=1, error_code=code))
            raise EndedError

    with ScriptedServer(Fickle(), http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, b"first")), Delivered)
            outcome = sender.send(an_archive(tmp_path, b"second"))
    assert failed(outcome) in (Reason.CONNECTION_LOST, Reason.PROTOCOL)
    assert isinstance(outcome, Deferred)
    assert outcome.unconfirmed_digest is not None


def test_a_request_that_is_refused_unprocessed_is_sent_at_once_on_another_connection(
    tmp_path: Path, pki: Pki
) -> None:
    class Choosy(Endpoint):
        def asked(self, talk: Talk) -> None:
            if talk.stream > 1:
                talk.connection.reset_stream(talk.stream, error_code=7)

    endpoint = Choosy()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            for number in range(3):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
    assert endpoint.archives == [b"0", b"1", b"2"]


@pytest.mark.parametrize("size", [100_000, 2 * MIB])
def test_what_is_left_of_an_answer_is_no_trouble_of_the_next(tmp_path: Path, pki: Pki, size: int) -> None:
    class Wordy(Endpoint):
        """Says all in a header, and goes on in a body that nobody needs."""

        def has_all(self, talk: Talk) -> None:
            digest = hashlib.sha256(self.archives[-1]).hexdigest()
            talk.answer((":status", "201"), ("x-digest", digest))
            for _ in range(size // 10_000):
                if talk.connection.local_flow_control_window(talk.stream) >= 10_000:
                    talk.connection.send_data(talk.stream, bytes(10_000))
            talk.connection.end_stream(talk.stream)

    with ScriptedServer(Wordy(), http2_context(pki)) as server:
        destination = a_destination(server.url, pki, http2=True, receipt={"digest": "header:X-Digest"})
        with a_sender(destination) as sender:
            for number in range(200 if size < MIB else 20):
                outcome = sender.send(an_archive(tmp_path, b"%d" % number))
                assert isinstance(outcome, Delivered), (number, outcome)


def test_who_takes_no_request_at_all_costs_one_connection_an_attempt(tmp_path: Path, pki: Pki) -> None:
    class Closing(Endpoint):
        def begun(self, talk: Talk) -> None:
            talk.send(GoAwayFrame(0, last_stream_id=0))

    endpoint = Closing()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT))) is Reason.CONNECTION_LOST
    assert endpoint.connections == 1


def test_a_connection_that_ended_between_two_archives_is_not_used_again(tmp_path: Path, pki: Pki) -> None:
    class Ending(Endpoint):
        def has_all(self, talk: Talk) -> None:
            super().has_all(talk)
            talk.flush()
            raise EndedError

    endpoint = Ending()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
                until(server.peers[-1].closed.is_set, "the end of the connection")
    assert endpoint.archives == [b"0", b"1", b"2", b"3", b"4"]
    assert endpoint.connections == 5


def test_what_is_said_between_two_archives_does_not_end_a_connection(tmp_path: Path, pki: Pki) -> None:
    class Lively(Endpoint):
        acknowledged = 0

        def has_all(self, talk: Talk) -> None:
            super().has_all(talk)
            talk.flush()
            talk.connection.ping(b"anybody?")
            talk.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: WINDOW + len(self.archives)})

        def heard(self, talk: Talk, event: h2.events.Event) -> None:
            self.acknowledged += isinstance(event, h2.events.PingAckReceived)
            super().heard(talk, event)

    endpoint = Lively()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
    assert endpoint.connections == 1
    assert endpoint.acknowledged >= 4


def test_who_talks_on_after_the_receipt_does_not_keep_us(tmp_path: Path, pki: Pki) -> None:
    class Endless(Endpoint):
        def has_all(self, talk: Talk) -> None:
            super().has_all(talk)
            talk.flush()
            _send_for_ever(talk, server, pause=0)

    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Endless(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True)) as sender,
    ):
        outcome = pool.submit(sender.send, an_archive(tmp_path, CONTENT)).result(timeout=TIMEOUT)
    assert isinstance(outcome, Delivered)


def test_an_archive_that_changes_while_it_is_sent_leaves_nothing_open(tmp_path: Path, pki: Pki) -> None:
    path = an_archive(tmp_path, size=MIB)

    class Changing(Endpoint):
        def given(self, talk: Talk, size: int) -> None:
            if path.stat().st_size == MIB:
                os.truncate(path, 10)
            super().given(talk, size)

    endpoint = Changing()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert isinstance(sender.send(path), Superseded)
            until(server.peers[0].closed.is_set, "the end of the connection")
            assert isinstance(sender.send(path), Delivered)
    assert endpoint.archives == [bytes(10)]


# Answers that are none

Answer = Callable[[Talk], None]


def a_word(talk: Talk) -> None:
    talk.answer((":status", "abc"), end=True)


def a_long_number(talk: Talk) -> None:
    talk.answer((":status", "9" * 30), end=True)


def no_status(talk: Talk) -> None:
    talk.answer(("server", "none"), end=True)


def two_statuses(talk: Talk) -> None:
    talk.answer((":status", "200"), (":status", "201"), end=True)


def less_than_it_says(talk: Talk) -> None:
    talk.answer((":status", "201"), ("content-length", "100"))
    talk.connection.send_data(talk.stream, b"less", end_stream=True)


def more_than_it_says(talk: Talk) -> None:
    talk.answer((":status", "201"), ("content-length", "2"))
    talk.connection.send_data(talk.stream, b"more", end_stream=True)


def too_large_a_frame(talk: Talk) -> None:
    talk.answer((":status", "201"))
    talk.send(DataFrame(talk.stream, bytes(17_000)))


def no_header_at_all(talk: Talk) -> None:
    talk.send(HeadersFrame(talk.stream, b"\xff\xff\xff\xff\xff", flags=["END_HEADERS"]))


def a_trailer_that_is_none(talk: Talk) -> None:
    talk.answer((":status", "201"))
    talk.send(HeadersFrame(talk.stream, b"\xff\xff\xff\xff\xff", flags=["END_HEADERS", "END_STREAM"]))


def a_reset(talk: Talk) -> None:
    talk.answer((":status", "201"))
    talk.send(RstStreamFrame(talk.stream, error_code=2))


def a_goaway_by_error(talk: Talk) -> None:
    talk.answer((":status", "201"))
    talk.send(GoAwayFrame(0, last_stream_id=talk.stream, error_code=2))


@pytest.mark.parametrize(
    "said",
    [
        a_word,
        a_long_number,
        no_status,
        two_statuses,
        less_than_it_says,
        more_than_it_says,
        too_large_a_frame,
        no_header_at_all,
        a_trailer_that_is_none,
        a_reset,
        a_goaway_by_error,
    ],
)
def test_an_answer_that_is_none_leaves_open_whether_it_arrived(
    tmp_path: Path, pki: Pki, said: Answer
) -> None:
    class Lying(Endpoint):
        def has_all(self, talk: Talk) -> None:
            if len(self.archives) == 1:
                said(talk)
            else:
                super().has_all(talk)

    with ScriptedServer(Lying(), http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            outcome = sender.send(an_archive(tmp_path, CONTENT))
            assert failed(outcome) is Reason.PROTOCOL
            assert isinstance(outcome, Deferred)
            assert outcome.unconfirmed_digest is not None
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


def test_a_status_that_is_none_costs_no_more_than_the_attempt(stage: Stage) -> None:
    class Lying(Endpoint):
        def has_all(self, talk: Talk) -> None:
            a_long_number(talk)

    with ScriptedServer(Lying(), http2_context(stage.pki)) as server:
        stage.configure(server.url, destination=f"http2 = true\n{QUICK}")
        daemon = stage.daemon().ready()
        path = stage.put("r1.cfg", CONTENT)
        (said, *_) = daemon.wait_for("attempt.failed", count=2)
        assert said["reason"] == "protocol_error"
        assert path.read_bytes() == CONTENT
        assert daemon.stop() == 0
    assert not daemon.events("daemon.failed")


# Windows, and what comes beside the answer


def test_a_window_that_is_less_than_nothing_is_waited_for(tmp_path: Path, pki: Pki) -> None:
    class Shrinking(Endpoint):
        def given(self, talk: Talk, size: int) -> None:
            if len(talk.body) == WINDOW:  # all of it is used up: from here on there is a debt
                talk.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
            elif len(talk.body) > WINDOW:
                super().given(talk, size)

        def heard(self, talk: Talk, event: h2.events.Event) -> None:
            if isinstance(event, h2.events.SettingsAcknowledged) and len(talk.body) == WINDOW:
                talk.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
                talk.connection.acknowledge_received_data(WINDOW, talk.stream)
            super().heard(talk, event)

    endpoint, content = Shrinking(), os.urandom(MIB)
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            outcome = sender.send(an_archive(tmp_path, content))
    assert isinstance(outcome, Delivered), outcome
    assert endpoint.archives == [content]


def test_a_window_that_stays_shut_is_waited_for_as_long_as_a_write(tmp_path: Path, pki: Pki) -> None:
    class Shut(Endpoint):
        def given(self, talk: Talk, size: int) -> None:
            """Open no window."""

    timeout = {"write": "1s", "read": "10m"}
    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Shut(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, timeout=timeout)) as sender,
    ):
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert failed(outcome) is Reason.WRITE_TIMEOUT


def test_the_least_rate_is_that_of_the_archive_alone(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Grudging(Endpoint):
        def given(self, talk: Talk, size: int) -> None:
            if len(talk.body) < WINDOW:
                return
            while not server.stopping.wait(0.02):
                talk.connection.increment_flow_control_window(1)
                talk.connection.increment_flow_control_window(1, talk.stream)
                for _ in range(20):
                    talk.connection.ping(b"progress")
                talk.flush()
                while select.select([talk.peer.socket], [], [], 0)[0]:
                    talk.peer._piece()

    monkeypatch.setattr(limits, "RATE_WINDOW", 1.0)
    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Grudging(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, min_rate="1KB")) as sender,
    ):
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert failed(outcome) is Reason.TOO_SLOW


def test_an_early_answer_without_an_end_is_not_waited_for_while_pings_come(tmp_path: Path, pki: Pki) -> None:
    class Early(Endpoint):
        def asked(self, talk: Talk) -> None:
            talk.answer((":status", "413"))
            _send_for_ever(talk, server, pause=0.02)

    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Early(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, min_rate="10B")) as sender,
    ):
        sender._uploader._limits._idle_timeout = 3.0
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert isinstance(outcome, Rejected)
    assert outcome.reason is Reason.TOO_LARGE


def _send_for_ever(talk: Talk, server: ScriptedServer, pause: float, settings: bool = False) -> None:
    """Send pings, or new settings, every so many seconds; with no pause thousands at a time."""
    for number in range(1000 if pause == 0 else 1):
        if settings:
            talk.connection.update_settings({SettingCodes.HEADER_TABLE_SIZE: number % 2})
        else:
            talk.connection.ping(b"endless!")
    frames = talk.connection.data_to_send()  # made once: to be faster than who has to answer them
    while not server.stopping.wait(pause):
        talk.peer.send(frames)
        while select.select([talk.peer.socket], [], [], 0)[0]:
            talk.peer._piece()


@pytest.mark.long
@pytest.mark.parametrize("settings", [False, True], ids=["pings", "settings"])
@pytest.mark.parametrize(
    ("pause", "shut", "expected"),
    [
        (0, False, Reason.PROTOCOL),
        (0, True, Reason.PROTOCOL),
        (0.05, False, Reason.READ_TIMEOUT),
        (0.05, True, Reason.WRITE_TIMEOUT),
    ],
    ids=["for an answer-in a flood", "for a window-in a flood", "for an answer", "for a window"],
)
def test_frames_without_an_end_end_the_attempt_without_a_deadline_too(
    tmp_path: Path, pki: Pki, pause: float, shut: bool, expected: Reason, settings: bool
) -> None:
    class Busy(Endpoint):
        def asked(self, talk: Talk) -> None:
            if shut:
                _send_for_ever(talk, server, pause, settings)

        def has_all(self, talk: Talk) -> None:
            talk.flush()
            _send_for_ever(talk, server, pause, settings)

    # without the ten minutes to connect, and where there is a flood with more time than it may take
    timeout = {"write": "1s" if pause else "5m"} if shut else {"read": "1s" if pause else "5m"}
    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Busy(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, timeout=timeout)) as sender,
    ):
        sender._uploader._limits._idle_timeout = None if shut or not pause else 3.0
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert failed(outcome) is expected


def test_frames_that_wait_to_be_read_cost_no_time_while_the_other_side_takes_nothing(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(Endpoint):
        def begun(self, talk: Talk) -> None:
            talk.connection.increment_flow_control_window(2**30)

        def asked(self, talk: Talk) -> None:
            talk.connection.increment_flow_control_window(2**30, talk.stream)

        def given(self, talk: Talk, size: int) -> None:
            talk.peer.pause()
            talk.connection.ping(b"unread!!")
            talk.flush()
            server.stopping.wait(TIMEOUT)

    turns: list[None] = []
    check, send = AttemptLimits._check_limits, TlsSocket.send

    def counted_check(self: AttemptLimits, now: float) -> None:
        turns.append(None)
        check(self, now)

    def counted_send(self: TlsSocket, view: memoryview) -> int:
        turns.append(None)
        return send(self, view)

    monkeypatch.setattr(AttemptLimits, "_check_limits", counted_check)
    monkeypatch.setattr(TlsSocket, "send", counted_send)
    with (
        ScriptedServer(Stuck(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True)) as sender,
        ThreadPoolExecutor(1) as pool,
    ):
        sending = pool.submit(sender.send, an_archive(tmp_path, size=64 * MIB))
        assert server.paused.wait(TIMEOUT)
        until(sender.is_stuck, "the client to be stuck")
        before = len(turns)
        server.resume()
        server.stopping.wait(0.5)
        taken = len(turns) - before
        sender.abort.set()
        assert failed(sending.result(timeout=TIMEOUT)) is Reason.STOPPED
    assert taken < 20
