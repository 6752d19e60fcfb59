"""Run the receiver in uvicorn with mutual TLS, in the foreground or in a thread."""

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
from backupd.receiver.routes import DEFAULT_PATH, create_app


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files: the receiver's certificate and chain, the key, and the CA of the client certificates."""

    cert: Path
    key: Path
    client_ca: Path


class AppOptions(TypedDict, total=False):
    """The optional arguments of `create_app`."""

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

    Port 0 chooses a free one. Raises ConfigError if the store or a certificate file can't be used,
    UnavailableError if the port can't be bound. `log_level` is that of uvicorn's loggers ("info" logs each
    request); the caller configures `logging`.
    """
    setup = _ServerSetup(store_dir, tls, host, port, log_level, stop_within=10, options=options)
    with contextlib.ExitStack() as cleanup:
        server = setup.prepare(cleanup)
        if ready:
            server.when_listening = lambda: ready(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[server.listener])


class RunningReceiver:
    """A receiver on the loopback interface that runs during a `with` block; upload to `url`.

    Running uploads have `stop_within` seconds to complete when the block ends. Entering it again, or another
    receiver with the same `port` and `store_dir`, serves the same store at the same URL.
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
        self._setup = _ServerSetup(store_dir, tls, "127.0.0.1", port, log_level, stop_within, options)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            self._server = server = self._setup.prepare(cleanup)
            self._cleanup = cleanup.pop_all()
        self.url, self.port = server.url, server.listener.getsockname()[1]
        self._setup = replace(self._setup, port=self.port)
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
            listening.set()  # if the server fails, `__enter__` must not wait indefinitely


class _Server(uvicorn.Server):
    """A uvicorn server that calls `when_listening` once it accepts connections."""

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
        """Stop without waiting for the TLS close_notify of clients, which idle ones never send."""
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # the transports close in the loop's next round
        if self.server_state.tasks:  # they are cancelled, and remove their temporary files now
            await asyncio.wait(self.server_state.tasks, timeout=5)


@dataclass(frozen=True, slots=True)
class _ServerSetup:
    """The arguments that a server is made from, each time that it starts."""

    store_dir: Path
    tls: ServerTls
    host: str
    port: int
    log_level: str
    stop_within: int
    options: AppOptions

    def prepare(self, cleanup: contextlib.ExitStack) -> _Server:
        """Return a server with its store, certificates and port open; errors are raised before it runs."""
        app = create_app(self.store_dir, **self.options)
        cleanup.callback(app.state.store.close)
        config = self._config(app)
        try:
            config.load()
        except OSError as error:  # includes ssl.SSLError
            raise ConfigError(f"the receiver's certificate, key or CA can't be used: {error}") from error
        listener = cleanup.enter_context(_listen(self.host, self.port))
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


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(f"the receiver can't listen on {host}:{port}: {error.strerror}") from error
    # asyncio sets TCP_NODELAY only on sockets created with an explicit IPPROTO_TCP. Without it each
    # response, which uvicorn sends in two writes, waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
