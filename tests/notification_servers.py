"""Real receivers of notifications on loopback: an SMTP server and a webhook."""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

PASSWORD = "correct-horse"


class MailServer:
    """An SMTP server; `mails` are the messages that it has accepted, in their order."""

    def __init__(self) -> None:
        self.port = 0
        self.mails: list[EmailMessage] = []

    def url(self, user: str = "", *, password: str = PASSWORD) -> str:
        """Return the URL for Apprise, with which a message goes from backupd to ops."""
        sign_in = f"{user}:{password}@" if user else ""
        addresses = "from=backupd@host.example&to=ops@host.example"
        return f"mailto://{sign_in}127.0.0.1:{self.port}/?{addresses}"

    def subjects(self) -> list[str]:
        return [str(mail["Subject"]) for mail in self.mails]

    def bodies(self) -> list[str]:
        return [body_of(mail) for mail in self.mails]

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content
        assert isinstance(content, bytes)
        self.mails.append(email.message_from_bytes(content, policy=email.policy.default))
        return "250 accepted"

    def sign_in(self, *arguments: Any) -> AuthResult:
        login = arguments[-1]
        assert isinstance(login, LoginPassword)
        return AuthResult(success=login.password == PASSWORD.encode(), handled=False)


def body_of(mail: EmailMessage) -> str:
    body = mail.get_body(("plain", "html"))
    assert body is not None
    return str(body.get_content())


@contextmanager
def a_mail_server() -> Iterator[MailServer]:
    server, loop, started = MailServer(), asyncio.new_event_loop(), threading.Event()

    async def listen() -> asyncio.Server:
        listener = await loop.create_server(
            lambda: SMTP(server, authenticator=server.sign_in, auth_require_tls=False, loop=loop),
            "127.0.0.1",
            0,
        )
        server.port = listener.sockets[0].getsockname()[1]
        started.set()
        return listener

    def serve() -> None:
        listener = loop.run_until_complete(listen())
        loop.run_forever()
        listener.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


class Webhook:
    """An HTTP server; `requests` are the paths and JSON bodies of the requests that it got, in their order.

    It responds with `status`, or, while `gate` is not set, not at all.
    """

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[tuple[str, Any]] = []
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()

    def url(self, path: str = "", scheme: str = "json") -> str:
        return f"{scheme}://127.0.0.1:{self.port}/{path}"

    def subjects(self) -> list[str]:
        return [body["title"] for _, body in self.requests]

    def bodies(self) -> list[str]:
        return [body["message"] for _, body in self.requests]


@contextmanager
def a_webhook() -> Iterator[Webhook]:
    webhook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            webhook.requests.append((self.path, json.loads(content or b"null")))
            webhook.gate.wait()
            self.send_response(webhook.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_arguments: Any) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_arguments: Any) -> None:
            return  # a client that was killed closes its connection

    server = Server(("127.0.0.1", 0), Handler)
    webhook.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield webhook
    finally:
        webhook.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
