"""The limit of bandwidth, the least rate and the deadline, measured over real sockets."""

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
from tests.endpoints import CLIENT_ID, CLIENT_SECRET, Login, guarded
from tests.pki import Pki
from tests.scripted import Peer, Script, ScriptedServer, answer, header_of, server_context, take_all
from tests.stage import TIMEOUT, until
from tests.uploading import MIB, Sender, a_destination, a_sender, an_archive

RATE = 8 * MIB
SPAN = 5.0
"""Seconds of a window in which the limit has to hold."""
ALL_DAY = dict.fromkeys(("connect", "read", "write"), "24h")
"""Time-outs that are none, so that it is something else that ends a wait."""

Moment = tuple[float, int]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def reason_of(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Deferred), outcome
    return outcome.reason


class Meter:
    """Takes raw archives, and notes when how many bytes arrived."""

    def __init__(self) -> None:
        self.arrived: list[Moment] = []

    def __call__(self, peer: Peer) -> None:
        while True:
            left = int(header_of(peer.read_head(), "content-length") or 0)
            digest = hashlib.sha256()
            while left:
                piece = peer.read(min(left, 16 * 1024))
                self.arrived.append((time.monotonic(), len(piece)))
                digest.update(piece)
                left -= len(piece)
            peer.send(answer(201, json.dumps({"sha256": digest.hexdigest()}).encode()))


def note_grants(bandwidth: BandwidthLimit) -> list[Moment]:
    """Return a list to which every grant of bandwidth is added."""
    grants: list[Moment] = []
    take = bandwidth.acquire

    def noted(wanted: int) -> tuple[int, float]:
        granted, wait = take(wanted)
        grants.append((time.monotonic(), granted))
        return granted, wait

    bandwidth.acquire = noted  # type: ignore[method-assign]
    return grants


def most_in_a_window(moments: Sequence[Moment], seconds: float) -> int:
    """Return the most bytes of any window of so many seconds."""
    ordered = sorted(moments)
    times = [at for at, _ in ordered]
    total = [0, *itertools.accumulate(count for _, count in ordered)]
    return max(
        total[bisect.bisect_right(times, begin + seconds)] - total[first] for first, begin in enumerate(times)
    )


def test_workers_together_keep_to_the_limit_and_use_it(
    tmp_path: Path, pki: Pki, record_property: Callable[[str, object], None]
) -> None:
    """No five seconds have 5 % too much; the fullest second, in which nothing held us up, has enough."""
    archives = [an_archive(tmp_path, size=4 * MIB, name=f"{number}.tar.gz") for number in range(16)]
    total = 16 * 4 * MIB
    meter, abort = Meter(), Abort()
    with ScriptedServer(meter, server_context(pki)) as server:
        endpoint = HttpEndpoint.open(a_destination(server.url, pki, body="raw", bandwidth="8MiB/s"), abort)
        assert endpoint.bandwidth is not None
        grants = note_grants(endpoint.bandwidth)
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

    assert sum(count for _, count in meter.arrived) == total
    elapsed = max(at for at, _ in grants) - min(at for at, _ in grants)
    rate = sum(count for _, count in grants) / elapsed
    worst = most_in_a_window(grants, SPAN) / (RATE * SPAN)
    worst_seen = most_in_a_window(meter.arrived, SPAN) / (RATE * SPAN)  # a late reader takes much at once
    best = most_in_a_window(grants, 1.0) / RATE
    figures = (
        f"{total // MIB} MiB in {elapsed:.2f} s: {rate / RATE:.2%} of the limit; fullest 5 s: "
        f"{worst:.2%} let out, {worst_seen:.2%} arrived; fullest second: {best:.2%}; MiB by worker: {shares}"
    )
    print(figures)
    record_property("bandwidth", figures)
    assert worst <= 1.05
    assert best >= 0.75
    assert min(shares) > 0


def test_the_limit_is_that_of_the_local_time_of_day() -> None:
    now = datetime.now().astimezone()
    minute = now.hour * 60 + now.minute
    around = RateWindow((minute - 120) % 1440, (minute + 120) % 1440, 1024)
    elsewhere = RateWindow((minute + 240) % 1440, (minute + 480) % 1440, 1024)

    granted, wait = BandwidthLimit(RateSchedule((around,), None)).acquire(MIB)
    assert granted == 0
    assert 15 < wait <= 16
    assert BandwidthLimit(RateSchedule((elsewhere,), None)).acquire(MIB) == (MIB, 0.0)


def reading(rate: int) -> Script:
    """Return a script that reads at a pace, in bytes per second, and then gives a receipt."""

    def script(peer: Peer) -> None:
        left = int(header_of(peer.read_head(), "content-length") or 0)
        digest = hashlib.sha256()
        while left:
            piece = peer.read(min(left, rate // 10))
            digest.update(piece)
            left -= len(piece)
            peer._server.stopping.wait(0.1)
        peer.send(answer(201, json.dumps({"sha256": digest.hexdigest()}).encode()))

    return script


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr("backupd.upload.http.limits.RATE_WINDOW", 0.5)
    return 0.5


class TestLeastRate:
    def test_an_endpoint_that_takes_too_little_ends_the_attempt(
        self, tmp_path: Path, pki: Pki, short_window: float
    ) -> None:
        with ScriptedServer(reading(50_000), server_context(pki)) as server:
            destination = a_destination(server.url, pki, body="raw", min_rate="1MB")
            with a_sender(destination) as sender:
                outcome = sender.send(an_archive(tmp_path, size=64 * MIB))
        assert reason_of(outcome) is Reason.TOO_SLOW
        assert "min_rate is 1000000" in repr(outcome)

    def test_one_that_takes_nothing_ends_it_as_well(
        self, tmp_path: Path, pki: Pki, short_window: float
    ) -> None:
        def script(peer: Peer) -> None:
            peer.read_head()
            peer.pause()

        with ScriptedServer(script, server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki)) as sender:
                assert reason_of(sender.send(an_archive(tmp_path, size=64 * MIB))) is Reason.TOO_SLOW

    def test_our_own_limit_is_not_the_endpoints_fault(
        self, tmp_path: Path, pki: Pki, short_window: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Time passes in the waits for bandwidth alone: no other of them is a short one."""
        now, wait = [0.0], AttemptLimits.wait

        def passing(self: AttemptLimits, fd: int, events: int, timeout: float | None) -> bool:
            if timeout is None or timeout > 1:
                return wait(self, fd, events, timeout)
            now[0] += timeout
            return wait(self, fd, events, 0)

        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr("backupd.upload.http.limits.time", clock)
        monkeypatch.setattr(AttemptLimits, "wait", passing)
        with ScriptedServer(take_all, server_context(pki)) as server:
            destination = a_destination(server.url, pki, bandwidth="64KiB/s", min_rate="1MB")
            with a_sender(destination) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, size=128 * 1024)), Delivered)
        assert now[0] > 2 * short_window

    def test_the_time_that_the_answer_takes_does_not_count(
        self, tmp_path: Path, pki: Pki, short_window: float
    ) -> None:
        with ScriptedServer(guarded(lambda _: True, thinks=1.5), server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki, min_rate="100kB")) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, size=1000)), Delivered)

    def test_nor_does_the_time_that_the_digest_takes_before_anything_is_sent(
        self, tmp_path: Path, pki: Pki, short_window: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest_of = RequestBuilder.digest_of

        def slowly(self: RequestBuilder, cargo: Any) -> Any:
            time.sleep(1.2)
            self._limits.check()
            return digest_of(self, cargo)

        monkeypatch.setattr(RequestBuilder, "digest_of", slowly)
        with ScriptedServer(take_all, server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki, digest_at="before", min_rate="100kB")) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, size=1000)), Delivered)

    def test_nor_that_of_the_sign_in(self, tmp_path: Path, pki: Pki, short_window: float) -> None:
        secret = tmp_path / "secret"
        secret.write_text(CLIENT_SECRET)
        login = Login(thinks=1.2)
        with (
            ScriptedServer(login, server_context(pki)) as tokens,
            ScriptedServer(guarded(login.is_good), server_context(pki)) as server,
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
        (take_all, {"bandwidth": "1KiB/s"}),
        (reading(20_000), {"body": "raw"}),
    ],
)
@pytest.mark.parametrize("size", [64 * 1024, 16 * MIB])
def test_the_deadline_ends_an_attempt_wherever_it_stands(
    tmp_path: Path, pki: Pki, script: Script, keys: dict[str, str], size: int
) -> None:
    with ScriptedServer(script, server_context(pki)) as server:
        destination = a_destination(server.url, pki, deadline="0.6s", timeout=ALL_DAY, **keys)
        with a_sender(destination) as sender:
            began = time.monotonic()
            outcome = sender.send(an_archive(tmp_path, size=size))
            elapsed = time.monotonic() - began
    assert reason_of(outcome) is Reason.DEADLINE
    assert elapsed >= 0.6


def test_a_stop_ends_the_wait_for_bandwidth_at_once(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(take_all, server_context(pki)) as server:
        abort = Abort()
        one_in_hours = RateSchedule((), 1)
        endpoint = HttpEndpoint.open(a_destination(server.url, pki, bandwidth=one_in_hours), abort)
        assert endpoint.bandwidth is not None
        grants = note_grants(endpoint.bandwidth)
        uploader = HttpUploader(endpoint)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(Sender(uploader, abort).send, an_archive(tmp_path, size=MIB))
            until(lambda: 0 in [count for _, count in grants], "the wait for bandwidth")
            abort.set()
            assert reason_of(sending.result(timeout=TIMEOUT)) is Reason.STOPPED
        uploader.close()
        abort.close()


def test_a_refusal_is_heard_during_the_wait_for_bandwidth(tmp_path: Path, pki: Pki) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_head()
        peer.send(answer(413, b"too large"))
        peer.drain()

    with ScriptedServer(refuse, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, bandwidth="10KiB/s")) as sender:  # all takes hours
            outcome = sender.send(an_archive(tmp_path, size=64 * MIB))
    assert isinstance(outcome, Rejected)
    assert outcome.http_status == 413
