"""The bandwidth limit, the minimum rate and the deadline, measured over real sockets."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backupd.core.bandwidth import RateSchedule, RateWindow
from backupd.core.model import Deferred, Delivered, Outcome, Rejected
from backupd.core.policy import Reason
from backupd.upload.base import Abort
from backupd.upload.http.limits import AttemptLimits, BandwidthLimit
from backupd.upload.http.request import RequestBuilder
from backupd.upload.http.uploader import HttpEndpoint, HttpUploader
from tests.endpoints import CLIENT_ID, CLIENT_SECRET, Login, requires_sign_in
from tests.pki import Pki
from tests.scripted import Peer, Script, ScriptedServer, accept_all, header_of, http_response, server_context
from tests.stage import TIMEOUT, until
from tests.uploading import MIB, Sender, a_destination, a_sender, an_archive

RATE = 8 * MIB
SPAN = 5.0
"""Seconds over which the bandwidth limit must be kept."""
LONG_TIMEOUTS = dict.fromkeys(("connect", "read", "write"), "24h")
"""Time-outs that never end a wait, so that another limit does."""

Moment = tuple[float, int]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def reason_of(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Deferred), outcome
    return outcome.reason


class Meter:
    """Stores raw archives, and records the time and size of each read."""

    def __init__(self) -> None:
        self.received: list[Moment] = []

    def __call__(self, peer: Peer) -> None:
        while True:
            left = int(header_of(peer.read_head(), "content-length") or 0)
            digest = hashlib.sha256()
            while left:
                piece = peer.read(min(left, 16 * 1024))
                self.received.append((time.monotonic(), len(piece)))
                digest.update(piece)
                left -= len(piece)
            peer.send(http_response(201, json.dumps({"sha256": digest.hexdigest()}).encode()))


def record_grants(bandwidth: BandwidthLimit) -> list[Moment]:
    """Return a list to which every grant of bandwidth is appended."""
    grants: list[Moment] = []
    acquire = bandwidth.acquire

    def recorded(wanted: int) -> tuple[int, float]:
        granted, wait = acquire(wanted)
        grants.append((time.monotonic(), granted))
        return granted, wait

    bandwidth.acquire = recorded  # type: ignore[method-assign]
    return grants


def max_bytes_in(moments: Sequence[Moment], seconds: float) -> int:
    """Return the largest number of bytes in any period of `seconds`."""
    ordered = sorted(moments)
    times = [at for at, _ in ordered]
    total = [0, *itertools.accumulate(count for _, count in ordered)]
    return max(
        total[bisect.bisect_right(times, begin + seconds)] - total[first] for first, begin in enumerate(times)
    )


def test_all_workers_together_use_the_bandwidth_and_never_exceed_it(
    tmp_path: Path, pki: Pki, record_property: Callable[[str, object], None]
) -> None:
    """No five seconds exceed the limit by 5 %, and the fastest second uses at least 75 % of it."""
    archives = [an_archive(tmp_path, size=4 * MIB, name=f"{number}.tar.gz") for number in range(16)]
    total = 16 * 4 * MIB
    meter, abort = Meter(), Abort()
    with ScriptedServer(meter, server_context(pki)) as server:
        endpoint = HttpEndpoint.open(a_destination(server.url, pki, body="raw", bandwidth="8MiB/s"), abort)
        assert endpoint.bandwidth is not None
        grants = record_grants(endpoint.bandwidth)
        uploaders = [HttpUploader(endpoint) for _ in range(3)]
        waiting = iter(archives)
        lock, shares = threading.Lock(), [0, 0, 0]

        def work(number: int) -> None:
            while True:
                with lock:
                    archive = next(waiting, None)
                if archive is None:
                    return
                assert isinstance(Sender(uploaders[number], abort).send(archive), Delivered)
                shares[number] += 4

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(3)))
        for uploader in uploaders:
            uploader.close()
        abort.close()

    assert sum(count for _, count in meter.received) == total
    elapsed = max(at for at, _ in grants) - min(at for at, _ in grants)
    rate = sum(count for _, count in grants) / elapsed
    worst = max_bytes_in(grants, SPAN) / (RATE * SPAN)
    # a reader that was delayed reads more at once, so this is for information only
    worst_received = max_bytes_in(meter.received, SPAN) / (RATE * SPAN)
    best = max_bytes_in(grants, 1.0) / RATE
    figures = (
        f"{total // MIB} MiB in {elapsed:.2f} s: {rate / RATE:.2%} of the limit; fastest 5 s: {worst:.2%} "
        f"granted, {worst_received:.2%} received; fastest second: {best:.2%}; MiB by worker: {shares}"
    )
    print(figures)
    record_property("bandwidth", figures)
    assert worst <= 1.05
    assert best >= 0.75
    assert min(shares) > 0


def test_the_rate_of_the_local_time_of_day_applies() -> None:
    now = datetime.now().astimezone()
    minute = now.hour * 60 + now.minute
    around = RateWindow((minute - 120) % 1440, (minute + 120) % 1440, 1024)
    elsewhere = RateWindow((minute + 240) % 1440, (minute + 480) % 1440, 1024)

    granted, wait = BandwidthLimit(RateSchedule((around,), None)).acquire(MIB)
    assert granted == 0
    assert 15 < wait <= 16
    assert BandwidthLimit(RateSchedule((elsewhere,), None)).acquire(MIB) == (MIB, 0.0)


def reading(rate: int) -> Script:
    """Return a script that reads `rate` bytes per second, and then sends a receipt."""

    def script(peer: Peer) -> None:
        left = int(header_of(peer.read_head(), "content-length") or 0)
        digest = hashlib.sha256()
        while left:
            piece = peer.read(min(left, rate // 10))
            digest.update(piece)
            left -= len(piece)
            peer._server.stopping.wait(0.1)
        peer.send(http_response(201, json.dumps({"sha256": digest.hexdigest()}).encode()))

    return script


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr("backupd.upload.http.limits.RATE_WINDOW", 0.5)
    return 0.5


class TestMinRate:
    def test_an_endpoint_that_reads_too_slowly_ends_the_attempt(
        self, tmp_path: Path, pki: Pki, short_window: float
    ) -> None:
        with ScriptedServer(reading(50_000), server_context(pki)) as server:
            destination = a_destination(server.url, pki, body="raw", min_rate="1MB")
            with a_sender(destination) as sender:
                outcome = sender.send(an_archive(tmp_path, size=64 * MIB))
        assert reason_of(outcome) is Reason.TOO_SLOW
        assert "min_rate is 1000000" in repr(outcome)

    def test_an_endpoint_that_reads_nothing_ends_the_attempt(
        self, tmp_path: Path, pki: Pki, short_window: float
    ) -> None:
        def script(peer: Peer) -> None:
            peer.read_head()
            peer.pause()

        with ScriptedServer(script, server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki)) as sender:
                assert reason_of(sender.send(an_archive(tmp_path, size=64 * MIB))) is Reason.TOO_SLOW

    def test_the_bandwidth_limit_does_not_count_as_slowness_of_the_endpoint(
        self, tmp_path: Path, pki: Pki, short_window: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The clock advances in the waits for bandwidth only: they alone last less than a second."""
        now, wait = [0.0], AttemptLimits.wait

        def advance(self: AttemptLimits, fd: int, events: int, timeout: float | None) -> bool:
            if timeout is None or timeout > 1:
                return wait(self, fd, events, timeout)
            now[0] += timeout
            return wait(self, fd, events, 0)

        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr("backupd.upload.http.limits.time", clock)
        monkeypatch.setattr(AttemptLimits, "wait", advance)
        with ScriptedServer(accept_all, server_context(pki)) as server:
            destination = a_destination(server.url, pki, bandwidth="64KiB/s", min_rate="1MB")
            with a_sender(destination) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, size=128 * 1024)), Delivered)
        assert now[0] > 2 * short_window

    def test_the_time_for_the_response_does_not_count(
        self, tmp_path: Path, pki: Pki, short_window: float
    ) -> None:
        with ScriptedServer(requires_sign_in(lambda _: True, delay=1.5), server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki, min_rate="100kB")) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, size=1000)), Delivered)

    def test_the_time_to_calculate_the_digest_first_does_not_count(
        self, tmp_path: Path, pki: Pki, short_window: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest_of = RequestBuilder.digest_of

        def slow_digest_of(self: RequestBuilder, job: Any) -> Any:
            time.sleep(1.2)
            self._limits.check()
            return digest_of(self, job)

        monkeypatch.setattr(RequestBuilder, "digest_of", slow_digest_of)
        with ScriptedServer(accept_all, server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki, digest_at="before", min_rate="100kB")) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, size=1000)), Delivered)

    def test_the_time_for_the_sign_in_does_not_count(
        self, tmp_path: Path, pki: Pki, short_window: float
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_text(CLIENT_SECRET)
        login = Login(delay=1.2)
        with (
            ScriptedServer(login, server_context(pki)) as tokens,
            ScriptedServer(requires_sign_in(login.is_good), server_context(pki)) as server,
        ):
            auth = {
                "type": "oauth2",
                "token_url": tokens.url,
                "client_id": CLIENT_ID,
                "client_secret_file": secret,
                "ca": pki.ca_pem,
                "cert": pki.client_cert,
                "key": pki.client_key,
            }
            with a_sender(a_destination(server.url, pki, auth=auth, min_rate="100kB")) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, size=1000)), Delivered)


def _stuck_before_the_body(peer: Peer) -> None:
    peer.pause()


def _stuck_after_the_body(peer: Peer) -> None:
    peer.read_request()
    peer.pause()


@pytest.mark.parametrize(
    ("script", "keys"),
    [
        (_stuck_before_the_body, {}),
        (_stuck_after_the_body, {}),
        (accept_all, {"bandwidth": "1KiB/s"}),
        (reading(20_000), {"body": "raw"}),
    ],
)
@pytest.mark.parametrize("size", [64 * 1024, 16 * MIB])
def test_the_deadline_ends_an_attempt_in_every_phase(
    tmp_path: Path, pki: Pki, script: Script, keys: dict[str, str], size: int
) -> None:
    with ScriptedServer(script, server_context(pki)) as server:
        destination = a_destination(server.url, pki, deadline="0.6s", timeout=LONG_TIMEOUTS, **keys)
        with a_sender(destination) as sender:
            started_at = time.monotonic()
            outcome = sender.send(an_archive(tmp_path, size=size))
            elapsed = time.monotonic() - started_at
    assert reason_of(outcome) is Reason.DEADLINE
    assert elapsed >= 0.6


def test_an_abort_ends_the_wait_for_bandwidth_immediately(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(accept_all, server_context(pki)) as server:
        abort = Abort()
        one_byte_per_second = RateSchedule((), 1)
        endpoint = HttpEndpoint.open(a_destination(server.url, pki, bandwidth=one_byte_per_second), abort)
        assert endpoint.bandwidth is not None
        grants = record_grants(endpoint.bandwidth)
        uploader = HttpUploader(endpoint)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(Sender(uploader, abort).send, an_archive(tmp_path, size=MIB))
            until(lambda: 0 in [count for _, count in grants], "the wait for bandwidth")
            abort.set()
            assert reason_of(sending.result(timeout=TIMEOUT)) is Reason.STOPPED
        uploader.close()
        abort.close()


def test_a_refusal_is_noticed_during_the_wait_for_bandwidth(tmp_path: Path, pki: Pki) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_response(413, b"too large"))
        peer.drain()

    with ScriptedServer(refuse, server_context(pki)) as server:
        with a_sender(
            a_destination(server.url, pki, bandwidth="10KiB/s")
        ) as sender:  # which would take hours
            outcome = sender.send(an_archive(tmp_path, size=64 * MIB))
    assert isinstance(outcome, Rejected)
    assert outcome.http_status == 413
