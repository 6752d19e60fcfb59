"""Common web servers and proxies before an endpoint: each archive arrives once, while they reload."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable

import pytest

from backupd.core.policy import Reason
from tests.scripted import ScriptedServer, accept_all, server_context
from tests.servers.fronts import CADDY_WITH_LIMIT, FRONTS, SQUID, running_front
from tests.stage import Stage
from tests.uploading import MIB

pytestmark = pytest.mark.long

FAST_RETRY = 'retry = { initial = "0.1s", max = "1s" }'
SIZES = [1, 1000, 65_536, 300_000, MIB, 12 * MIB]


def deliver_through_reloads(stage: Stage, reload: Callable[[], None]) -> list[bytes]:
    """Deliver 24 archives through three reloads; return their contents."""
    daemon = stage.daemon().ready()
    contents = [os.urandom(SIZES[number % len(SIZES)]) for number in range(24)]
    for number, content in enumerate(contents):
        stage.put(f"sw-{number}.cfg", content)
        if number % 8 == 4:
            daemon.wait_for("archive.disposed", number // 2)  # others are uploading
            reload()
    daemon.wait_for("archive.disposed", len(contents))
    assert len(stage.archives(stage.sent)) == len(contents)
    assert not daemon.events("archive.rejected")
    assert daemon.stop() == 0
    return contents


def stored(endpoint: ScriptedServer) -> Counter[bytes]:
    """Return how often each content was stored."""
    return Counter(request.archive for request in endpoint.requests if request.head.startswith(b"POST"))


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("name", FRONTS)
def test_each_archive_is_stored_once_through_three_reloads(stage: Stage, name: str, http2: bool) -> None:
    port = stage.a_free_port()
    with (
        ScriptedServer(accept_all) as endpoint,
        running_front(FRONTS[name], port, endpoint.port, stage.pki) as (reload, _),
    ):
        stage.configure(
            f"https://localhost:{port}/v1/upload",
            destination=f"http2 = {str(http2).lower()}\nworkers = 3\n{FAST_RETRY}",
        )
        (probe,) = json.loads(stage.backupd("check", "--json").stdout)["destinations"]
        assert probe["http_version"] == ("HTTP/2" if http2 else "HTTP/1.1"), probe
        contents = deliver_through_reloads(stage, reload)
    assert stored(endpoint) == Counter(contents)


def test_each_archive_is_stored_once_through_three_reloads_of_a_proxy(stage: Stage) -> None:
    port = stage.a_free_port()
    with (
        ScriptedServer(accept_all, server_context(stage.pki)) as endpoint,
        running_front(SQUID, port, endpoint.port, stage.pki) as (reload, _),
    ):
        stage.configure(
            endpoint.url, destination=f'proxy = "http://127.0.0.1:{port}"\nworkers = 3\n{FAST_RETRY}'
        )
        contents = deliver_through_reloads(stage, reload)
    assert stored(endpoint) == Counter(contents)


def test_a_token_that_is_too_large_for_node_rejects_no_archive(stage: Stage) -> None:
    port, token = stage.a_free_port(), stage.base / "token"
    token.write_text("x" * 40_000)
    with (
        ScriptedServer(accept_all) as endpoint,
        running_front(FRONTS["node"], port, endpoint.port, stage.pki),
    ):
        stage.configure(
            f"https://localhost:{port}/",
            destination=f'header_files = {{ X-Token = "{token}" }}\n{FAST_RETRY}',
        )
        for number in range(5):
            stage.put(f"r{number}.cfg", b"%d" % number)
        daemon = stage.daemon().ready()
        paused = daemon.wait_for("destination.paused", 3)
        assert {event["reason"] for event in paused} == {Reason.HEAD_TOO_LARGE}
        token.write_text("short")
        daemon.wait_for("archive.disposed", 5)
    assert len(stage.archives(stage.sent)) == 5


def test_an_archive_that_is_too_large_for_caddy_alone_fails_and_is_listed(stage: Stage) -> None:
    port = stage.a_free_port()
    with (
        ScriptedServer(accept_all) as endpoint,
        running_front(CADDY_WITH_LIMIT, port, endpoint.port, stage.pki),
    ):
        stage.configure(f"https://localhost:{port}/v1/upload", destination=FAST_RETRY)
        daemon = stage.daemon().ready()
        stage.put("large.cfg", bytes(1_000_000))
        for number in range(3):
            stage.put(f"small-{number}.cfg", b"content %d" % number)
        daemon.wait_for("archive.disposed", 3)
        (alone, *_) = daemon.wait_for("attempt.failed", archive="large.cfg", reason="fails_alone")
        assert alone["http_status"] == 502
        stage.put("later.cfg", b"later")
        daemon.wait_for("archive.disposed", 4)
        (problem,) = json.loads(stage.backupd("list", "--problems", "--json").stdout)
        assert (problem["relpath"], problem["reason"]) == ("large.cfg", "fails_alone")
        assert json.loads(stage.backupd("status", "--json").stdout)["destinations"][0]["circuit"] == "working"
        assert daemon.stop() == 0
