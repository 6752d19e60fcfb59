"""Endpoints that require a sign-in, issue tokens, or never respond."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tests.scripted import Peer, Request, Script, header_of, http_response, receipt_for

CLIENT_ID = "backupd"
CLIENT_SECRET = "s3cret/with+what=forms&escape"
UNAUTHORIZED = http_response(401, b'{"title":"sign in"}', WWW_Authenticate="Bearer")


class Login:
    """A token endpoint (RFC 6749 section 4.4): issues tokens, counts them, and checks them.

    A token is valid for `lifetime` seconds, which the response contains if `states_lifetime`. Each response
    takes `delay` seconds.
    """

    def __init__(self, *, lifetime: float = 3600.0, states_lifetime: bool = True, delay: float = 0.0) -> None:
        self.lifetime = lifetime
        self.issued_at: list[float] = []
        self.forms: list[dict[str, str]] = []
        self.instead: bytes | None = None
        self._states_lifetime = states_lifetime
        self._delay = delay
        self._good_until: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, peer: Peer) -> None:
        """Serve a connection; the response is `instead` if that is set."""
        while True:
            request = peer.read_request()
            time.sleep(self._delay)
            peer.send(self._respond(request))

    @property
    def shortest_wait(self) -> float:
        """Return the shortest time in seconds between two fetches."""
        waits = [later - earlier for earlier, later in zip(self.issued_at, self.issued_at[1:], strict=False)]
        return min(waits, default=float("inf"))

    def is_good(self, request: Request) -> bool:
        """Return whether a request has a token that has not expired."""
        kind, _, token = (request.header("authorization") or "").partition(" ")
        return kind == "Bearer" and time.monotonic() < self._good_until.get(token, 0.0)

    def revoke_all(self) -> None:
        """Revoke every token."""
        with self._lock:
            self._good_until.clear()

    def _respond(self, request: Request) -> bytes:
        form = dict(urllib.parse.parse_qsl(request.body.decode()))
        with self._lock:
            self.issued_at.append(time.monotonic())
            self.forms.append(form)
            if self.instead is not None:
                return self.instead
            if _client_of(request, form) != (CLIENT_ID, CLIENT_SECRET):
                return oauth_error("invalid_client")
            token = f"token-{len(self.issued_at)}"
            self._good_until[token] = self.issued_at[-1] + self.lifetime
        lifetime = {"expires_in": self.lifetime} if self._states_lifetime else {}
        return json_response({"access_token": token, "token_type": "Bearer", **lifetime})


def json_response(content: Any, status: int = 200) -> bytes:
    """Return a response with JSON."""
    return http_response(status, json.dumps(content).encode(), Content_Type="application/json")


def oauth_error(error: str, description: str = "", status: int = 400) -> bytes:
    """Return an error response of RFC 6749 section 5.2."""
    return json_response(
        {"error": error, **({"error_description": description} if description else {})}, status
    )


def _client_of(request: Request, form: dict[str, str]) -> tuple[str, str]:
    kind, _, value = (request.header("authorization") or "").partition(" ")
    if kind != "Basic":
        return form.get("client_id", ""), form.get("client_secret", "")
    user, _, password = base64.b64decode(value).decode().partition(":")
    return urllib.parse.unquote_plus(user), urllib.parse.unquote_plus(password)


def requires_sign_in(is_good: Callable[[Request], bool], *, delay: float = 0.0) -> Script:
    """Return a script that stores archives with a valid sign-in, and responds 401 to other requests.

    The sign-in is checked when the request is complete; the response takes another `delay` seconds.
    """

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            is_signed_in = is_good(request)
            time.sleep(delay)
            peer.send(receipt_for(request.archive) if is_signed_in else UNAUTHORIZED)

    return script


class ScriptedProxy:
    """A script for an HTTP proxy (RFC 9110 section 9.3.6); `tunnelled` holds the bytes that clients sent."""

    def __init__(self, credentials: str = "", refusal: bytes = b"") -> None:
        self.tunnelled = bytearray()
        self.targets: list[str] = []
        self.credentials: list[str | None] = []
        self._expected = f"Basic {base64.b64encode(credentials.encode()).decode()}" if credentials else None
        self._refusal = refusal

    def __call__(self, peer: Peer) -> None:
        head = peer.read_head()
        self.credentials.append(header_of(head, "proxy-authorization"))
        self.targets.append(head.split(b" ")[1].decode())
        if self._refusal or self.credentials[-1] != self._expected:
            peer.send(self._refusal or http_response(407, Proxy_Authenticate='Basic realm="proxy"'))
            return
        host, _, port = self.targets[-1].rpartition(":")
        with socket.create_connection((host, int(port))) as target:
            peer.send(http_response(200).replace(b"Content-Length: 0\r\n", b""))
            back = threading.Thread(target=self._back, args=(target, peer))
            back.start()
            try:
                while True:
                    piece = peer._piece()
                    self.tunnelled += piece
                    target.sendall(piece)
            finally:
                with suppress(OSError):
                    target.shutdown(socket.SHUT_RDWR)
                back.join()

    @staticmethod
    def _back(target: socket.socket, peer: Peer) -> None:
        with suppress(OSError):
            while piece := target.recv(64 * 1024):
                peer.send(piece)
        peer.interrupt()


@contextmanager
def a_full_listener() -> Iterator[int]:
    """Yield a port on the loopback interface with a full backlog: it accepts no further connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
