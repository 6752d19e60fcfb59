"""HTTP/2: GOAWAY, RST_STREAM, SETTINGS and flow control, and protection against floods of frames."""

from __future__ import annotations

import hashlib
import os
import select
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, GoAwayFrame, HeadersFrame, RstStreamFrame

from backupd.core.model import Deferred, Delivered, Outcome, Rejected, Superseded
from backupd.core.policy import Reason
from backupd.upload.http import limits
from backupd.upload.http.limits import AttemptLimits
from backupd.upload.http.stream import TlsSocket
from tests.http2_server import Exchange, Http2Server, http2_context
from tests.pki import Pki
from tests.scripted import EndedError, ScriptedServer, accept_all, server_context
from tests.stage import TIMEOUT, Stage, until
from tests.uploading import MIB, a_destination, a_sender, an_archive

CONTENT = b"the content of an archive" * 1000
FAST_RETRY = 'retry = { initial = "0.1s", max = "0.3s" }'
WINDOW = 65_535
"""The initial flow-control window in bytes."""


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def failed(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Deferred), outcome
    return outcome.reason


def assert_delivered_at_once(endpoint: Http2Server, contents: list[bytes], folder: Path, pki: Pki) -> None:
    """Assert that an endpoint receives each archive at the first attempt."""
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            outcomes = [sender.send(an_archive(folder, content)) for content in contents]
    assert all(isinstance(outcome, Delivered) for outcome in outcomes), outcomes
    assert endpoint.archives == contents


def test_archives_of_all_sizes_use_one_connection(tmp_path: Path, pki: Pki) -> None:
    endpoint = Http2Server()
    contents = [b"", b"x", os.urandom(100_000), os.urandom(5 * MIB)]
    assert_delivered_at_once(endpoint, contents, tmp_path, pki)
    assert endpoint.connections == 1
    assert {head[":method"] for head in endpoint.heads} == {"POST"}
    assert {head["idempotency-key"] for head in endpoint.heads} == {"the-delivery"}


def test_an_endpoint_without_http2_gets_http_1_1(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(accept_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert server.requests[0].head.startswith(b"POST /v1/upload HTTP/1.1\r\n")


def test_http2_is_off_by_default(tmp_path: Path, pki: Pki) -> None:
    context = server_context(pki)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with ScriptedServer(accept_all, context) as server:
        with a_sender(a_destination(server.url, pki)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


def test_the_daemon_delivers_many_archives_over_http2(stage: Stage) -> None:
    endpoint = Http2Server()
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


@pytest.mark.parametrize("warnings", [0, 1], ids=["immediate", "after a warning"])
def test_a_goaway_does_not_interrupt_the_running_upload(tmp_path: Path, pki: Pki, warnings: int) -> None:
    class Leaving(Http2Server):
        def request_started(self, exchange: Exchange) -> None:
            last_streams = [2**31 - 1] * warnings + [exchange.stream]
            exchange.send(*(GoAwayFrame(0, last_stream_id=last) for last in last_streams))

    endpoint, contents = Leaving(), [os.urandom(MIB) for _ in range(3)]
    assert_delivered_at_once(endpoint, contents, tmp_path, pki)
    assert endpoint.connections == 3


def test_a_request_that_a_goaway_excludes_is_sent_on_a_new_connection_immediately(
    tmp_path: Path, pki: Pki
) -> None:
    class OneEach(Http2Server):
        def request_started(self, exchange: Exchange) -> None:
            if exchange.stream > 1:
                exchange.send(GoAwayFrame(0, last_stream_id=1))

    endpoint, contents = OneEach(), [os.urandom(MIB) for _ in range(3)]
    assert_delivered_at_once(endpoint, contents, tmp_path, pki)
    assert endpoint.connections == 3


@pytest.mark.parametrize("code", [0, 2])
def test_a_goaway_within_a_response_leaves_the_upload_unconfirmed(
    tmp_path: Path, pki: Pki, code: int
) -> None:
    class Fickle(Http2Server):
        def request_complete(self, exchange: Exchange) -> None:
            if exchange.stream == 1:
                super().request_complete(exchange)
                return
            exchange.respond((":status", "201"), ("content-length", "100"))
            exchange.connection.send_data(exchange.stream, b"a part")
            exchange.flush()
            server.stopping.wait(0.2)  # so that the client receives the beginning separately
            exchange.send(GoAwayFrame(0, last_stream_id=1, error_code=code))
            raise EndedError

    with ScriptedServer(Fickle(), http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, b"first")), Delivered)
            outcome = sender.send(an_archive(tmp_path, b"second"))
    assert failed(outcome) in (Reason.CONNECTION_LOST, Reason.PROTOCOL)
    assert isinstance(outcome, Deferred)
    assert outcome.unconfirmed_digest is not None


@pytest.mark.parametrize("code", [0, 2])
def test_a_goaway_after_a_response_does_not_void_it(tmp_path: Path, pki: Pki, code: int) -> None:
    class Leaving(Http2Server):
        def request_complete(self, exchange: Exchange) -> None:
            super().request_complete(exchange)
            goaway = GoAwayFrame(0, last_stream_id=exchange.stream, error_code=code).serialize()
            exchange.peer.send(exchange.connection.data_to_send() + goaway)
            raise EndedError

    endpoint, contents = Leaving(), [b"one", b"two"]
    assert_delivered_at_once(endpoint, contents, tmp_path, pki)
    assert endpoint.connections == 2


def test_a_request_with_refused_stream_is_sent_on_a_new_connection_immediately(
    tmp_path: Path, pki: Pki
) -> None:
    class Choosy(Http2Server):
        def request_started(self, exchange: Exchange) -> None:
            if exchange.stream > 1:
                exchange.connection.reset_stream(exchange.stream, error_code=7)

    endpoint = Choosy()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            for number in range(3):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
    assert endpoint.archives == [b"0", b"1", b"2"]


@pytest.mark.parametrize("by", ["RST_STREAM", "GOAWAY"])
def test_a_destination_that_requires_http_1_1_names_the_key_to_set(tmp_path: Path, pki: Pki, by: str) -> None:
    class Old(Http2Server):
        def request_started(self, exchange: Exchange) -> None:
            if by == "GOAWAY":
                exchange.send(GoAwayFrame(0, last_stream_id=1, error_code=13))
            else:
                exchange.connection.reset_stream(exchange.stream, error_code=13)

    with ScriptedServer(Old(), http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            outcome = sender.send(an_archive(tmp_path, b"content"))
    assert isinstance(outcome, Deferred)
    assert outcome.reason is Reason.PROTOCOL
    assert "requires HTTP/1.1 for this request: set `http2 = false`" in outcome.error


@pytest.mark.parametrize("size", [100_000, 2 * MIB])
def test_the_unread_rest_of_a_response_does_not_affect_the_next_request(
    tmp_path: Path, pki: Pki, size: int
) -> None:
    class Wordy(Http2Server):
        """Sends the digest in a header, and a body that the client does not read."""

        def request_complete(self, exchange: Exchange) -> None:
            digest = hashlib.sha256(self.archives[-1]).hexdigest()
            exchange.respond((":status", "201"), ("x-digest", digest))
            for _ in range(size // 10_000):
                if exchange.connection.local_flow_control_window(exchange.stream) >= 10_000:
                    exchange.connection.send_data(exchange.stream, bytes(10_000))
            exchange.connection.end_stream(exchange.stream)

    with ScriptedServer(Wordy(), http2_context(pki)) as server:
        destination = a_destination(server.url, pki, http2=True, receipt={"digest": "header:X-Digest"})
        with a_sender(destination) as sender:
            for number in range(200 if size < MIB else 20):
                outcome = sender.send(an_archive(tmp_path, b"%d" % number))
                assert isinstance(outcome, Delivered), (number, outcome)


def test_a_server_that_accepts_no_request_costs_one_connection_per_attempt(tmp_path: Path, pki: Pki) -> None:
    class Closing(Http2Server):
        def connected(self, exchange: Exchange) -> None:
            exchange.send(GoAwayFrame(0, last_stream_id=0))

    endpoint = Closing()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT))) is Reason.CONNECTION_LOST
    assert endpoint.connections == 1


def test_a_connection_that_ended_between_two_archives_is_not_reused(tmp_path: Path, pki: Pki) -> None:
    class Ending(Http2Server):
        def request_complete(self, exchange: Exchange) -> None:
            super().request_complete(exchange)
            exchange.flush()
            raise EndedError

    endpoint = Ending()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
                until(server.peers[-1].closed.is_set, "the end of the connection")
    assert endpoint.archives == [b"0", b"1", b"2", b"3", b"4"]
    assert endpoint.connections == 5


def test_frames_between_two_archives_do_not_end_the_connection(tmp_path: Path, pki: Pki) -> None:
    class Lively(Http2Server):
        acknowledged = 0

        def request_complete(self, exchange: Exchange) -> None:
            super().request_complete(exchange)
            exchange.flush()
            exchange.connection.ping(b"between!")
            exchange.connection.update_settings(
                {SettingCodes.INITIAL_WINDOW_SIZE: WINDOW + len(self.archives)}
            )

        def received(self, exchange: Exchange, event: h2.events.Event) -> None:
            self.acknowledged += isinstance(event, h2.events.PingAckReceived)
            super().received(exchange, event)

    endpoint = Lively()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
    assert endpoint.connections == 1
    assert endpoint.acknowledged >= 4


def test_endless_frames_after_the_receipt_do_not_delay_the_worker(tmp_path: Path, pki: Pki) -> None:
    class Endless(Http2Server):
        def request_complete(self, exchange: Exchange) -> None:
            super().request_complete(exchange)
            exchange.flush()
            _send_endlessly(exchange, server, pause=0)

    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Endless(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True)) as sender,
    ):
        outcome = pool.submit(sender.send, an_archive(tmp_path, CONTENT)).result(timeout=TIMEOUT)
    assert isinstance(outcome, Delivered)


def test_an_archive_that_changes_during_its_upload_leaves_no_connection_open(
    tmp_path: Path, pki: Pki
) -> None:
    path = an_archive(tmp_path, size=MIB)

    class Changing(Http2Server):
        def data_received(self, exchange: Exchange, size: int) -> None:
            if path.stat().st_size == MIB:
                os.truncate(path, 10)
            super().data_received(exchange, size)

    endpoint = Changing()
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            assert isinstance(sender.send(path), Superseded)
            until(server.peers[0].closed.is_set, "the end of the connection")
            assert isinstance(sender.send(path), Delivered)
    assert endpoint.archives == [bytes(10)]


# Invalid responses

Respond = Callable[[Exchange], None]


def a_status_of_letters(exchange: Exchange) -> None:
    exchange.respond((":status", "abc"), end=True)


def a_status_of_30_digits(exchange: Exchange) -> None:
    exchange.respond((":status", "9" * 30), end=True)


def no_status(exchange: Exchange) -> None:
    exchange.respond(("server", "none"), end=True)


def two_statuses(exchange: Exchange) -> None:
    exchange.respond((":status", "200"), (":status", "201"), end=True)


def a_body_below_content_length(exchange: Exchange) -> None:
    exchange.respond((":status", "201"), ("content-length", "100"))
    exchange.connection.send_data(exchange.stream, b"less", end_stream=True)


def a_body_above_content_length(exchange: Exchange) -> None:
    exchange.respond((":status", "201"), ("content-length", "2"))
    exchange.connection.send_data(exchange.stream, b"more", end_stream=True)


def a_frame_above_the_limit(exchange: Exchange) -> None:
    exchange.respond((":status", "201"))
    exchange.send(DataFrame(exchange.stream, bytes(17_000)))


def invalid_headers(exchange: Exchange) -> None:
    exchange.send(HeadersFrame(exchange.stream, b"\xff\xff\xff\xff\xff", flags=["END_HEADERS"]))


def invalid_trailers(exchange: Exchange) -> None:
    exchange.respond((":status", "201"))
    exchange.send(HeadersFrame(exchange.stream, b"\xff\xff\xff\xff\xff", flags=["END_HEADERS", "END_STREAM"]))


def a_reset(exchange: Exchange) -> None:
    exchange.respond((":status", "201"))
    exchange.send(RstStreamFrame(exchange.stream, error_code=2))


def a_goaway_with_an_error(exchange: Exchange) -> None:
    exchange.respond((":status", "201"))
    exchange.send(GoAwayFrame(0, last_stream_id=exchange.stream, error_code=2))


@pytest.mark.parametrize(
    "respond",
    [
        a_status_of_letters,
        a_status_of_30_digits,
        no_status,
        two_statuses,
        a_body_below_content_length,
        a_body_above_content_length,
        a_frame_above_the_limit,
        invalid_headers,
        invalid_trailers,
        a_reset,
        a_goaway_with_an_error,
    ],
)
def test_an_invalid_response_leaves_the_upload_unconfirmed(
    tmp_path: Path, pki: Pki, respond: Respond
) -> None:
    class Invalid(Http2Server):
        def request_complete(self, exchange: Exchange) -> None:
            if len(self.archives) == 1:
                respond(exchange)
            else:
                super().request_complete(exchange)

    with ScriptedServer(Invalid(), http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            outcome = sender.send(an_archive(tmp_path, CONTENT))
            assert failed(outcome) is Reason.PROTOCOL
            assert isinstance(outcome, Deferred)
            assert outcome.unconfirmed_digest is not None
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


def test_an_invalid_status_fails_the_attempt_only(stage: Stage) -> None:
    class Invalid(Http2Server):
        def request_complete(self, exchange: Exchange) -> None:
            a_status_of_30_digits(exchange)

    with ScriptedServer(Invalid(), http2_context(stage.pki)) as server:
        stage.configure(server.url, destination=f"http2 = true\n{FAST_RETRY}")
        daemon = stage.daemon().ready()
        path = stage.put("r1.cfg", CONTENT)
        (failure, *_) = daemon.wait_for("attempt.failed", count=2)
        assert failure["reason"] == "protocol_error"
        assert path.read_bytes() == CONTENT
        assert daemon.stop() == 0
    assert not daemon.events("daemon.failed")


# Flow control, and frames other than the response


def test_waits_for_a_negative_flow_control_window(tmp_path: Path, pki: Pki) -> None:
    class Shrinking(Http2Server):
        def data_received(self, exchange: Exchange, size: int) -> None:
            if len(exchange.body) == WINDOW:  # the window is used up, so that it becomes negative
                exchange.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
            elif len(exchange.body) > WINDOW:
                super().data_received(exchange, size)

        def received(self, exchange: Exchange, event: h2.events.Event) -> None:
            if isinstance(event, h2.events.SettingsAcknowledged) and len(exchange.body) == WINDOW:
                exchange.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
                exchange.connection.acknowledge_received_data(WINDOW, exchange.stream)
            super().received(exchange, event)

    endpoint, content = Shrinking(), os.urandom(MIB)
    with ScriptedServer(endpoint, http2_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, http2=True)) as sender:
            outcome = sender.send(an_archive(tmp_path, content))
    assert isinstance(outcome, Delivered), outcome
    assert endpoint.archives == [content]


def test_a_window_that_is_opened_by_the_request_is_used(tmp_path: Path, pki: Pki) -> None:
    class Reserved(Http2Server):
        def connected(self, exchange: Exchange) -> None:
            exchange.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})

        def request_started(self, exchange: Exchange) -> None:
            exchange.connection.increment_flow_control_window(WINDOW, exchange.stream)

    contents = [os.urandom(MIB), b"small", os.urandom(MIB)]
    assert_delivered_at_once(Reserved(), contents, tmp_path, pki)


def test_the_write_timeout_ends_the_wait_for_a_closed_window(tmp_path: Path, pki: Pki) -> None:
    class Closed(Http2Server):
        def data_received(self, exchange: Exchange, size: int) -> None:
            """Do not open the window."""

    timeout = {"write": "1s", "read": "10m"}
    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Closed(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, timeout=timeout)) as sender,
    ):
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert failed(outcome) is Reason.WRITE_TIMEOUT


def test_only_bytes_of_the_archive_count_for_the_min_rate(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Grudging(Http2Server):
        def data_received(self, exchange: Exchange, size: int) -> None:
            if len(exchange.body) < WINDOW:
                return
            while not server.stopping.wait(0.02):
                exchange.connection.increment_flow_control_window(1)
                exchange.connection.increment_flow_control_window(1, exchange.stream)
                for _ in range(20):
                    exchange.connection.ping(b"progress")
                exchange.flush()
                while select.select([exchange.peer.socket], [], [], 0)[0]:
                    exchange.peer._piece()

    monkeypatch.setattr(limits, "RATE_WINDOW", 1.0)
    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Grudging(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, min_rate="1KB")) as sender,
    ):
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert failed(outcome) is Reason.TOO_SLOW


def test_the_outside_body_timeout_ends_an_endless_early_response_with_pings(tmp_path: Path, pki: Pki) -> None:
    class Early(Http2Server):
        def request_started(self, exchange: Exchange) -> None:
            exchange.respond((":status", "413"))
            _send_endlessly(exchange, server, pause=0.02)

    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Early(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, min_rate="10B")) as sender,
    ):
        sender._uploader._limits._outside_body_timeout = 3.0
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert isinstance(outcome, Rejected)
    assert outcome.reason is Reason.TOO_LARGE


def _send_endlessly(exchange: Exchange, server: ScriptedServer, pause: float, settings: bool = False) -> None:
    """Send pings, or new settings, every `pause` seconds; without a pause, thousands at a time."""
    exchange.flush()  # the head of a response is sent once
    for number in range(1000 if pause == 0 else 1):
        if settings:
            exchange.connection.update_settings({SettingCodes.HEADER_TABLE_SIZE: number % 2})
        else:
            exchange.connection.ping(b"endless!")
    frames = (
        exchange.connection.data_to_send()
    )  # made once, to be faster than the client that acknowledges them
    while not server.stopping.wait(pause):
        exchange.peer.send(frames)
        while select.select([exchange.peer.socket], [], [], 0)[0]:
            exchange.peer._piece()


@pytest.mark.long
@pytest.mark.parametrize("settings", [False, True], ids=["pings", "settings"])
@pytest.mark.parametrize(
    ("pause", "is_closed", "expected"),
    [
        (0, False, Reason.PROTOCOL),
        (0, True, Reason.PROTOCOL),
        (0.05, False, Reason.READ_TIMEOUT),
        (0.05, True, Reason.WRITE_TIMEOUT),
    ],
    ids=["response-flood", "window-flood", "response", "window"],
)
def test_endless_frames_end_the_attempt_without_a_deadline(
    tmp_path: Path, pki: Pki, pause: float, is_closed: bool, expected: Reason, settings: bool
) -> None:
    class Busy(Http2Server):
        def request_started(self, exchange: Exchange) -> None:
            if is_closed:
                _send_endlessly(exchange, server, pause, settings)

        def request_complete(self, exchange: Exchange) -> None:
            exchange.flush()
            _send_endlessly(exchange, server, pause, settings)

    # a flood must end by its own limit, long before these time-outs
    timeout = {"write": "1s" if pause else "5m"} if is_closed else {"read": "1s" if pause else "5m"}
    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(Busy(), http2_context(pki)) as server,
        a_sender(a_destination(server.url, pki, http2=True, timeout=timeout)) as sender,
    ):
        sender._uploader._limits._outside_body_timeout = None if is_closed or not pause else 3.0
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=MIB)).result(timeout=TIMEOUT)
    assert failed(outcome) is expected


def test_unread_frames_cause_no_busy_loop_while_the_server_reads_nothing(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(Http2Server):
        def connected(self, exchange: Exchange) -> None:
            exchange.connection.increment_flow_control_window(2**30)

        def request_started(self, exchange: Exchange) -> None:
            exchange.connection.increment_flow_control_window(2**30, exchange.stream)

        def data_received(self, exchange: Exchange, size: int) -> None:
            exchange.peer.pause()
            exchange.connection.ping(b"unread!!")
            exchange.flush()
            server.stopping.wait(TIMEOUT)

    calls: list[None] = []
    check, send = AttemptLimits._check_limits, TlsSocket.send

    def counted_check(self: AttemptLimits, now: float) -> None:
        calls.append(None)
        check(self, now)

    def counted_send(self: TlsSocket, view: memoryview) -> int:
        calls.append(None)
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
        before = len(calls)
        server.resume()
        server.stopping.wait(0.5)
        made = len(calls) - before
        sender.abort.set()
        assert failed(sending.result(timeout=TIMEOUT)) is Reason.STOPPED
    assert made < 20
