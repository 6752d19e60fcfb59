"""Whatever a connection dies of, and whenever: the next attempt starts from nothing."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Deferred, Delivered
from tests.endpoints import ScriptedProxy
from tests.pki import Pki
from tests.scripted import Peer, ScriptedServer, accept_all, http_response, receipt_for, server_context
from tests.uploading import a_destination, a_sender, an_archive

pytestmark = pytest.mark.long

TIMES = 50
STEPS = [
    "connect",
    "handshake",
    "after the handshake",
    "head",
    "body",
    "response",
    "response's body",
    "after the response",
]


class Mortal:
    """An endpoint, or a proxy before it, of which each connection dies at a step until `works` is set."""

    def __init__(self, pki: Pki, step: str) -> None:
        self.works = False
        self._context = server_context(pki)
        self._step = step

    def __call__(self, peer: Peer) -> None:
        if self.works:
            peer.do_handshake(self._context)
            accept_all(peer)
        if self._step == "connect":
            peer.reset()
        if self._step == "handshake":
            peer._piece()
            peer.reset()
        peer.do_handshake(self._context)
        if self._step == "head":
            peer._piece()
        elif self._step == "body":
            peer.read_head()
            peer.read(10)
        elif self._step != "after the handshake":
            content = peer.read_request().archive
            reply = receipt_for(content)
            if self._step == "response":
                reply = reply[:20]
            elif self._step == "response's body":
                reply = reply[:-5]
            peer.send(reply)
        peer.reset()


@pytest.mark.parametrize("way", ["directly", "through a proxy"])
@pytest.mark.parametrize("step", STEPS)
def test_the_first_attempt_after_many_deaths_delivers(tmp_path: Path, step: str, way: str) -> None:
    pki = Pki(tmp_path / "pki")
    endpoint = Mortal(pki, step)
    with ScriptedServer(endpoint) as server, ScriptedServer(ScriptedProxy()) as proxy:
        keys: dict[str, Any] = {}
        if way == "through a proxy":
            keys["proxy"] = f"http://127.0.0.1:{proxy.port}"
        url = f"https://127.0.0.1:{server.port}/v1/upload"
        with a_sender(a_destination(url, pki, **keys)) as sender:
            for number in range(TIMES):
                outcome = sender.send(an_archive(tmp_path, b"%d" % number, size=300_000))
                # a connection may die when the next request is just being sent
                allowed = (Delivered, Deferred) if step == "after the response" else Deferred
                assert isinstance(outcome, allowed), outcome
            endpoint.works = True
            outcome = sender.send(an_archive(tmp_path, b"the last one"))
    assert isinstance(outcome, Delivered), outcome


@pytest.mark.parametrize("step", ["connect", "CONNECT", "refusal", "tunnel"])
def test_the_first_attempt_after_many_deaths_of_a_proxy_delivers(tmp_path: Path, step: str) -> None:
    pki, tunnel, works = Pki(tmp_path / "pki"), ScriptedProxy(), [False]

    def mortal_proxy(peer: Peer) -> None:
        if works[0]:
            tunnel(peer)
            return
        if step != "connect":
            peer.read_head()
            if step == "refusal":
                peer.send(http_response(503))
            elif step == "tunnel":
                peer.send(b"HTTP/1.1 200 Connected\r\n\r\n")
                peer._piece()
        peer.reset()

    with ScriptedServer(accept_all, server_context(pki)) as server, ScriptedServer(mortal_proxy) as proxy:
        destination = a_destination(server.url, pki, proxy=f"http://127.0.0.1:{proxy.port}")
        with a_sender(destination) as sender:
            for _ in range(TIMES):
                assert isinstance(sender.send(an_archive(tmp_path, b"content")), Deferred)
            works[0] = True
            outcome = sender.send(an_archive(tmp_path, b"content"))
    assert isinstance(outcome, Delivered), outcome


def test_the_first_attempt_after_many_failures_of_the_name_service_delivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki, getaddrinfo = Pki(tmp_path / "pki"), socket.getaddrinfo

    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with (
        ScriptedServer(accept_all, server_context(pki)) as server,
        a_sender(a_destination(server.url, pki)) as s,
    ):
        monkeypatch.setattr(socket, "getaddrinfo", fail)
        for _ in range(TIMES):
            assert isinstance(s.send(an_archive(tmp_path, b"content")), Deferred)
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        assert isinstance(s.send(an_archive(tmp_path, b"content")), Delivered)
