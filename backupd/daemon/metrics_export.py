"""Serves the metrics by HTTP and writes them to a file; no failure of it stops or delays deliveries."""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from backupd import __version__
from backupd.config.certificate_files import client_validity
from backupd.config.files import certificate_limits, metrics_problems
from backupd.config.models import Config, MetricsConfig
from backupd.config.problems import error_text
from backupd.config.reloading_context import ReloadingContext
from backupd.config.tls_loading import load_authorities, load_certificate
from backupd.core.errors import BackupdError
from backupd.core.snapshot import Snapshot
from backupd.daemon.monitor import Monitor
from backupd.daemon.state_page import StatePage
from backupd.daemon.threads import Threads
from backupd.telemetry import events
from backupd.telemetry.http_server import HttpServer, PageRequest, PageResponse
from backupd.telemetry.liveness import Liveness
from backupd.telemetry.log import EventLog
from backupd.telemetry.textfile import TextfileWriter

if TYPE_CHECKING:
    from backupd.telemetry.metrics import Metrics

_STOP_TIMEOUT = 1.0
"""Seconds within which the threads of a replaced server end; a hung disk may keep the writer of the file."""

_LISTEN, _TEXTFILE = "metrics.listen", "metrics.textfile"


class MetricsExport:
    """Runs the server and the writer that the `metrics` table configures.

    `configure` is called at the start and after each reload, `tick` every few seconds, `request_stop` at the
    end. Each failure is logged, is a problem of the daemon, and is retried. `pages` are the pages of the
    server; others may be added.
    """

    def __init__(self, log: EventLog, monitor: Monitor, threads: Threads) -> None:
        self._log = log
        self._monitor = monitor
        self._threads = threads
        self._config: Config | None = None
        self._metrics: Metrics | None = None
        self._liveness = Liveness()
        self._server: HttpServer | None = None
        self._context: ReloadingContext | None = None
        self._writer: TextfileWriter | None = None
        self._is_changing = False
        """Whether the certificate files have changed since the last tick."""
        self._is_refused = False
        """Whether renewed files could not be loaded."""
        self._next_check = -math.inf
        """When the files are checked again (monotonic)."""
        self._failures: dict[str, str] = {}
        """The errors that were logged last, by the key of the configuration."""
        self._state_page = StatePage()
        self.pages: dict[str, Callable[[PageRequest], PageResponse]] = {
            "/": self._root_page,
            "/metrics": self._metrics_page,
            "/healthz": self._liveness.healthz,
            "/readyz": self._liveness.readyz,
        }
        monitor.listeners.append(self._on_snapshot)

    def configure(self, config: Config) -> None:
        """Start, change or stop the server and the writer as a configuration demands."""
        before, self._config = self._config, config
        self._configure_metrics(config)
        if before is not None and before.metrics == config.metrics:
            return
        self.request_stop()
        self._forget_failures()
        metrics = config.metrics
        if metrics.textfile is not None:
            self._start_writer(metrics.textfile)
        if metrics.cert is not None:
            paths = (metrics.ca, metrics.cert, metrics.key, metrics.key_password_file)
            self._context = ReloadingContext(lambda: _make_context(metrics), paths)
        self.tick()

    def tick(self) -> None:
        """Retry to listen, load renewed certificate files, and check them at each heartbeat."""
        if self._config is None:
            return
        if self._config.metrics.listen is not None and self._server is None:
            self._start_server(self._config.metrics.listen)
        if self._context is None:
            return
        was_changing, self._is_changing = self._is_changing, self._context.files_changed()
        is_renewed = was_changing and not self._is_changing  # the key may be written after the certificate
        if not is_renewed and time.monotonic() < self._next_check:
            return
        if is_renewed or self._is_refused:
            self._load_renewed(self._context)
        self._check_files()

    def request_stop(self) -> None:
        """End the server at once and have the file written a last time; wait for them for a moment."""
        watchdogs = []
        if self._server is not None:
            self._server.request_stop()
            watchdogs += [thread.watchdog for thread in self._server.threads]
        if self._writer is not None:
            self._writer.request_stop()
            watchdogs.append(self._writer.watchdog)
        self._threads.join(watchdogs, time.monotonic() + _STOP_TIMEOUT)
        self._server = self._writer = self._context = None

    def _configure_metrics(self, config: Config) -> None:
        if not config.metrics.is_enabled:
            if self._metrics is not None:
                self._log.listeners.remove(self._metrics.count)
            self._metrics = None
        elif self._metrics is None:
            from backupd.telemetry.metrics import Metrics  # noqa: PLC0415 -- takes memory, so only if needed

            host, log = socket.gethostname(), self._log
            self._metrics = Metrics(config, host, __version__, lambda: log.lost_lines)
            log.listeners.append(self._metrics.count)
            if self._monitor.latest is not None:
                self._metrics.update(self._monitor.latest)
        else:
            self._metrics.configure(config)

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        self._liveness.update(snapshot)
        if self._metrics is not None:
            self._metrics.update(snapshot)
        if self._writer is not None:
            self._writer.notify()

    def _metrics_page(self, request: PageRequest) -> PageResponse:
        assert self._metrics is not None  # noqa: S101 -- a server runs only with metrics
        return PageResponse(*self._metrics.exposition(request.accept))

    def _root_page(self, _request: PageRequest) -> PageResponse:
        assert self._config is not None  # noqa: S101 -- set before anything is started
        return self._state_page.response(self._config, self._monitor.latest)

    # The server

    def _start_server(self, address: str) -> None:
        context = self._context.context if self._context is not None else None
        try:
            server = HttpServer(address, self.pages, self._on_page_error, context)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO).lower()  # the text of Python repeats the address
            text = f"no server can listen at {address}: {reason}"
            self._report(_LISTEN, text, _listen_hint(error, address))
            return
        self._server = server
        for thread in server.threads:
            self._threads.start(thread.run, server.stop, thread.watchdog)
        self._solve(_LISTEN)
        self._log_served()

    def _log_served(self) -> None:
        assert self._config is not None  # noqa: S101 -- set before anything is started
        metrics, now = self._config.metrics, datetime.now(UTC)
        limits = certificate_limits(self._config)
        validity = client_validity(metrics, limits, now) if metrics.cert else None
        days_left = limits.life(validity, now).days_left if validity else None
        self._log.emit(events.METRICS_SERVED, listen=metrics.listen, days_left=days_left)

    def _on_page_error(self, error: Exception) -> None:
        """Log an exception of a page, or of the certificate files; called by the server's threads."""
        if isinstance(error, BackupdError):
            self._log.emit(events.METRICS_FAILED, path=_LISTEN, error=error.message, hint=error.hint)
        else:
            self._log.emit(events.METRICS_FAILED, path=_LISTEN, error=repr(error), exc_info=error)

    def _load_renewed(self, context: ReloadingContext) -> None:
        try:
            context.reload()
        except BackupdError:  # among the problems of the files; the earlier ones stay in use
            self._is_refused = True
        else:
            self._is_refused = False
            self._log_served()

    def _check_files(self) -> None:
        """Report the problems of the certificate files, such as a certificate that expires soon."""
        assert self._config is not None  # noqa: S101 -- set before anything is started
        self._next_check = time.monotonic() + self._config.heartbeat_every.total_seconds()
        found = {
            problem.where: problem
            for problem in metrics_problems(self._config, datetime.now(UTC))
            if problem.where != _TEXTFILE and (problem.fatal or problem.where == "metrics.cert")
        }
        for key in self._failures.keys() - found.keys() - {_LISTEN, _TEXTFILE}:
            self._solve(key)
        for key, problem in found.items():
            self._report(key, problem.message, problem.hint)

    # The file

    def _start_writer(self, path: Path) -> None:
        metrics = self._metrics
        assert metrics is not None  # noqa: S101 -- a file is written only with metrics

        def heartbeat_every() -> float:
            return self._config.heartbeat_every.total_seconds() if self._config else math.inf

        def on_result(error: Exception | None) -> None:
            if error is None:
                self._solve(_TEXTFILE)
                return
            text = error_text(error) if isinstance(error, OSError) else repr(error)
            hint = (
                f"permit uid {os.geteuid()} to write there, and set ReadWritePaths={path.parent} in the unit"
            )
            self._report(_TEXTFILE, f"{path} can't be written: {text}", hint)

        writer = TextfileWriter(
            path, lambda: metrics.exposition()[0], metrics.last_exposition, heartbeat_every, on_result
        )
        self._writer = writer
        self._threads.start(writer.run, writer.stop, writer.watchdog)
        if self._monitor.latest is not None:
            writer.notify()

    # Failures

    def _report(self, key: str, error: str, hint: str) -> None:
        if self._failures.get(key) != error:
            self._failures[key] = error
            self._log.emit(events.METRICS_FAILED, path=key, error=error, hint=hint)
        self._monitor.report(key, error, hint)

    def _solve(self, key: str) -> None:
        if self._failures.pop(key, None) is not None:
            self._log.emit(events.METRICS_RECOVERED, path=key)
        self._monitor.solve(key)

    def _forget_failures(self) -> None:
        """Forget the failures of an earlier configuration."""
        for key in list(self._failures):
            del self._failures[key]
            self._monitor.solve(key)


def _make_context(metrics: MetricsConfig) -> ssl.SSLContext:
    """Return the context of the server; with `ca`, clients need a certificate. Raises TlsFilesError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, metrics)
    if metrics.ca is not None:
        load_authorities(context, metrics.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _listen_hint(error: OSError, address: str) -> str:
    port = address.rpartition(":")[2]
    match error.errno:
        case errno.EADDRINUSE:
            return f"`ss -ltnp 'sport = :{port}'` shows the program that listens there; set another port"
        case errno.EADDRNOTAVAIL:
            return "set listen to an address of this host: `ip address`"
        case errno.EACCES:
            return "set a port above 1023"
        case _:
            return "set listen to another address and port"
