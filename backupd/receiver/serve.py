"""Runs the receiver under uvicorn with mutual TLS, in the foreground or in a thread."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, Unpack

import uvicorn
from fastapi import FastAPI

from backupd.core.errors import ConfigError, UnavailableError
from backupd.receiver.app import DEFAULT_PATH, create_app


@dataclass(frozen=True, slots=True)
class ServerTls:
    """The receiver's certificate (PEM, with its chain) and key, and the CA whose clients it lets in."""

    cert: Path
    key: Path
    client_ca: Path


class AppOptions(TypedDict, total=False):
    """What `create_app` takes besides the store, with the same defaults."""

    path: str
    file_field: str
    digest_field: str
    max_size: int | None


def serve(
    store_dir: Path,
    tls: ServerTls,
    *,
    host: str = "127.0.0.1",
    port: int = 8443,
    log_level: str = "warning",
    ready: Callable[[str], object] | None = None,
    **options: Unpack[AppOptions],
) -> None:
    """Serve in the foreground until SIGTERM or SIGINT; `ready` is called with the URL for uploads.

    Port 0 takes a free one. Raise ConfigError for a store or certificate that can't be used,
    UnavailableError for a port that can't be had. `log_level` is that of uvicorn's loggers ("info" has a
    line per request); where they write is for the caller's `logging` configuration to say.
    """
    plan = _Plan(store_dir, tls, host, port, log_level, stop_within=10, options=options)
    with contextlib.ExitStack() as cleanup:
        server = plan.prepare(cleanup)
        if ready:
            server.when_listening = lambda: ready(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[server.listener])


class RunningReceiver:
    """A receiver on the loopback interface, for as long as the `with` block; `url` takes uploads.

    Leaving the block gives uploads that are under way `stop_within` seconds to complete. Entering it
    again, or another one with the same `port` and `store_dir`, carries on where it left off.
    """

    url: str
    port: int

    def __init__(
        self,
        store_dir: Path,
        tls: ServerTls,
        *,
        port: int = 0,
        log_level: str = "critical",
        stop_within: int = 2,
        **options: Unpack[AppOptions],
    ) -> None:
        self.store_dir = store_dir
        self.port = port
        self._plan = _Plan(store_dir, tls, "127.0.0.1", port, log_level, stop_within, options)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            self._server = server = self._plan.prepare(cleanup)
            self._cleanup = cleanup.pop_all()
        self.url, self.port = server.url, server.listener.getsockname()[1]
        self._plan = replace(self._plan, port=self.port)
        listening = threading.Event()
        server.when_listening = listening.set
        self._thread = threading.Thread(target=self._run, args=(listening,), name="receiver", daemon=True)
        self._thread.start()
        listening.wait()
        if not server.started:
            self._thread.join()
            raise UnavailableError(f"the receiver on port {self.port} did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self, listening: threading.Event) -> None:
        try:
            with self._cleanup:
                self._server.run(sockets=[self._server.listener])
        finally:
            listening.set()  # whoever waits must not wait for ever when it fails


class _Server(uvicorn.Server):
    """A uvicorn server that says when it listens."""

    when_listening: Callable[[], object] | None = None

    def __init__(self, config: uvicorn.Config, listener: socket.socket, url: str) -> None:
        super().__init__(config)
        self.listener = listener
        self.url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.when_listening:
            self.when_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop without the TLS good-byes of the clients: idle ones never send any, and it would wait."""
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # the transports close in the loop's next round
        if self.server_state.tasks:  # cancelled by now; they still remove their temporary files
            await asyncio.wait(self.server_state.tasks, timeout=5)


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that a server is made of."""

    store_dir: Path
    tls: ServerTls
    host: str
    port: int
    log_level: str
    stop_within: int
    options: AppOptions

    def prepare(self, cleanup: contextlib.ExitStack) -> _Server:
        """Open store, certificates and port, so that what is wrong is raised before anything runs."""
        app = create_app(self.store_dir, **self.options)
        cleanup.callback(app.state.store.close)
        config = self._config(app)
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one, too
            raise ConfigError(f"the receiver's certificate, key or CA can't be used: {error}") from error
        listener = cleanup.enter_context(_bound(self.host, self.port))
        host = f"[{self.host}]" if ":" in self.host else self.host
        path = self.options.get("path", DEFAULT_PATH)
        return _Server(config, listener, f"https://{host}:{listener.getsockname()[1]}{path}")

    def _config(self, app: FastAPI) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            ssl_certfile=self.tls.cert,
            ssl_keyfile=self.tls.key,
            ssl_ca_certs=str(self.tls.client_ca),
            ssl_cert_reqs=ssl.CERT_REQUIRED,
            log_config=None,
            log_level=self.log_level,
            access_log=self.log_level in ("info", "debug", "trace"),
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=self.stop_within,
        )


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(f"the receiver can't listen on {host}:{port}: {error.strerror}") from error
    # asyncio sets this only on sockets made with IPPROTO_TCP written out; without it each answer,
    # which uvicorn sends in two writes, waits 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
