"""Endpoints of all sorts: ones that want a sign-in, give out tokens, or never answer."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.scripted import Peer, Request, Script, answer, receipt_for

CLIENT_ID = "backupd"
CLIENT_SECRET = "s3cret/with+what=forms&escape"
SIGN_IN_AGAIN = answer(401, b'{"title":"sign in"}', WWW_Authenticate="Bearer")


class Login:
    """A token endpoint (RFC 6749 section 4.4): issues tokens, counts them, and knows which are good.

    `life` is in seconds, `told` whether it states it; `thinks` is how long it takes for an answer.
    """

    def __init__(self, *, life: float = 3600.0, told: bool = True, thinks: float = 0.0) -> None:
        self.life = life
        self.issued_at: list[float] = []
        self.forms: list[dict[str, str]] = []
        self.instead: bytes | None = None
        self._told = told
        self._thinks = thinks
        self._good_until: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, peer: Peer) -> None:
        """Serve a connection; `instead` is answered to whoever asks, if it is set."""
        while True:
            request = peer.read_request()
            time.sleep(self._thinks)
            peer.send(self._answer(request))

    @property
    def shortest_wait(self) -> float:
        """Return the shortest time in seconds between two fetches."""
        waits = [later - earlier for earlier, later in zip(self.issued_at, self.issued_at[1:], strict=False)]
        return min(waits, default=float("inf"))

    def is_good(self, request: Request) -> bool:
        """Tell whether a request carries a token that has not expired."""
        kind, _, token = (request.header("authorization") or "").partition(" ")
        return kind == "Bearer" and time.monotonic() < self._good_until.get(token, 0.0)

    def forget_all(self) -> None:
        """Revoke every token."""
        with self._lock:
            self._good_until.clear()

    def _answer(self, request: Request) -> bytes:
        form = dict(urllib.parse.parse_qsl(request.body.decode()))
        with self._lock:
            self.issued_at.append(time.monotonic())
            self.forms.append(form)
            if self.instead is not None:
                return self.instead
            if _client_of(request, form) != (CLIENT_ID, CLIENT_SECRET):
                return refused("invalid_client")
            token = f"token-{len(self.issued_at)}"
            self._good_until[token] = self.issued_at[-1] + self.life
        life = {"expires_in": self.life} if self._told else {}
        return answered({"access_token": token, "token_type": "Bearer", **life})


def answered(said: Any, status: int = 200) -> bytes:
    """Return an answer in JSON."""
    return answer(status, json.dumps(said).encode(), Content_Type="application/json")


def refused(error: str, description: str = "", status: int = 400) -> bytes:
    """Return an error of RFC 6749 section 5.2."""
    return answered({"error": error, **({"error_description": description} if description else {})}, status)


def _client_of(request: Request, form: dict[str, str]) -> tuple[str, str]:
    kind, _, value = (request.header("authorization") or "").partition(" ")
    if kind != "Basic":
        return form.get("client_id", ""), form.get("client_secret", "")
    user, _, password = base64.b64decode(value).decode().partition(":")
    return urllib.parse.unquote_plus(user), urllib.parse.unquote_plus(password)


def guarded(is_good: Callable[[Request], bool], *, thinks: float = 0.0) -> Script:
    """Return a script that stores what comes with a good sign-in, and answers 401 to everything else.

    The sign-in counts as it is when the whole request is there; then the script takes `thinks` seconds.
    """

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            good = is_good(request)
            time.sleep(thinks)
            peer.send(receipt_for(request.archive) if good else SIGN_IN_AGAIN)

    return script


@contextmanager
def a_full_listener() -> Iterator[int]:
    """Yield a port on the loopback interface that never completes another connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
