"""Runs the command in `on_event` for each event: a thread with a queue, one command at a time."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from backupd.config.models import Config
from backupd.config.problems import FileProblem, did_you_mean, quoted
from backupd.core.names import printable
from backupd.core.units import human_duration
from backupd.telemetry import events
from backupd.telemetry.command import CommandResult, run_command
from backupd.telemetry.log import EventLog
from backupd.telemetry.message import render
from backupd.telemetry.thread_watchdog import ThreadWatchdog

MAX_QUEUED = 1000
"""Events that wait for the command; further ones are dropped and counted."""

_MAX_OUTPUT = 300

_SLOW_HINT = "have the command end sooner, or set on_events to fewer events"
_FAILED_HINT = "run it as the daemon's user, with a line of the log on its standard input"


class HookRunner:
    """Passes events to the command as JSON on its standard input; its own failures are not passed on."""

    def __init__(self, config: Config, log: EventLog) -> None:
        self._config = config
        self._log = log
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._queue: deque[tuple[str, dict[str, Any]]] = deque()
        self._dropped = 0
        self.watchdog = ThreadWatchdog("hook runner")

    def configure(self, config: Config) -> None:
        """Use the command of another configuration from now on."""
        self._config = config

    def on_event(self, event: events.Event, values: Mapping[str, Any]) -> None:
        """Queue an event for the command, if it gets such events."""
        config = self._config
        if not config.on_event or event is events.HOOK_FAILED:
            return
        if event.name not in config.on_events if config.on_events else event.level == "debug":
            return
        record = {
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": event.level,
            "event": event.name,
            "message": render(event.message, values),
            "host": self._host,
            **values,
        }
        with self._lock:
            if len(self._queue) >= MAX_QUEUED:
                self._dropped += 1
            else:
                self._queue.append((event.name, record))
        self._changed.set()

    def wake(self) -> None:
        """Wake the thread."""
        self._changed.set()

    def run(self, stop: threading.Event) -> None:
        """Run the command for each event until `stop` is set and `wake` called; a running one is killed."""
        while not stop.is_set():
            self._changed.wait()
            self._changed.clear()
            while not stop.is_set() and (queued := self._next()):
                self._run_for(*queued, stop)
            self.watchdog.idle()

    def _next(self) -> tuple[str, dict[str, Any]] | None:
        with self._lock:
            dropped, self._dropped = self._dropped, 0
            queued = self._queue.popleft() if self._queue else None
        if dropped:
            self._fail(f"{dropped} events were not passed on, because it is too slow", _SLOW_HINT)
        return queued

    def _run_for(self, name: str, record: dict[str, Any], stop: threading.Event) -> None:
        config = self._config
        if not config.on_event:
            return
        seconds = config.on_event_timeout.total_seconds()
        stdin = json.dumps(record, separators=(",", ":")).encode() + b"\n"

        def is_cancelled() -> bool:
            self.watchdog.alive()
            return stop.is_set()

        try:
            result = run_command(
                config.on_event,
                stdin,
                hook_environment(name),
                seconds,
                is_cancelled=is_cancelled,
                with_stderr=True,
            )
        except OSError as error:
            self._fail(f"it cannot be started: {(error.strerror or 'unknown error').lower()}", _START_HINT)
            return
        if not result.is_cancelled and result.exit_code != 0:
            self._fail(_error(result, seconds), _FAILED_HINT, result.exit_code)

    def _fail(self, error: str, hint: str, exit_code: int | None = None) -> None:
        command = self._config.on_event[0] if self._config.on_event else "on_event"
        self._log.emit(events.HOOK_FAILED, command=command, exit_code=exit_code, error=error, hint=hint)


_START_HINT = "`ls -l` shows whether it is there and executable; a script needs a line such as #!/bin/sh"


def unknown_events(config: Config) -> Iterator[FileProblem]:
    """Yield a problem for each name in `on_events` that no event has; the command would never get it."""
    for name in config.on_events:
        if name not in events.CATALOGUE:
            text = f"there is no event {quoted(name)}{did_you_mean(name, events.CATALOGUE)}"
            hint = "the page about events has all names"
            yield FileProblem("on_events", text, hint, fatal=True, prevents_start=False)


def hook_environment(event: str) -> dict[str, str]:
    """Return the environment of the command: its search path and the name of the event."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "BACKUPD_EVENT": event}


def _error(result: CommandResult, seconds: float) -> str:
    if result.exit_code is None:
        return f"it was killed after {human_duration(seconds)}, its time limit"
    output = printable(result.output.decode("utf-8", "replace").strip().replace("\n", "; "))
    return f"it ended with {result.exit_code}" + (f": {output[:_MAX_OUTPUT]}" if output else "")
