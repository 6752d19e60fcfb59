"""The health of a drop folder's watcher: detects lost events and restarts the watcher."""

from __future__ import annotations

import time
from collections.abc import Callable

from backupd.core.names import as_text
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.filesystem import filesystem_of, is_remote
from backupd.intake.watcher import LIMITS_HINT, IsIgnored, OnEvent, Watcher, WatchError
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_POLL_EVERY = 5.0
"""Seconds between scans of a folder without events, unless `rescan_every` is shorter."""

_TEST_EVENT_TIMEOUT = 5.0
"""Seconds after which a test event that has not arrived is lost."""

_NO_ACTION_HINT = "no action needed: the rescan finds the files of lost events, and the watcher is restarted"


class WatchHealth:
    """Detects lost events of one drop folder, and restarts a watcher that does not work.

    It also chooses between the watcher, which uses inotify, and frequent scans where inotify does not work.
    """

    def __init__(self, drop: Drop, log: EventLog, on_event: OnEvent, is_ignored: IsIgnored) -> None:
        self._drop = drop.name
        self._config = drop.config
        self._folder = drop.folder
        self._log = log
        self._path = str(drop.config.path)
        self._on_event = on_event
        self._is_ignored = is_ignored
        self._watcher: Watcher | None = None
        self._is_polling = False
        self._degraded_reason = ""
        """The reason of the last `watch.degraded`; empty while events arrive."""
        self._root_failing = False
        self._requested_at: float | None = None
        """When the test event was requested that has not arrived yet (monotonic)."""

    @property
    def is_degraded(self) -> bool:
        """Whether files are found by scans only, if at all."""
        return bool(self._degraded_reason) or self._root_failing

    def open(self) -> None:
        """Choose between inotify and polling, log the choice and start."""
        filesystem = filesystem_of(self._path)
        observer = self._config.observer
        reason = "configured"
        if observer == "auto":
            remote = is_remote(filesystem)
            observer = "polling" if remote else "inotify"
            reason = "remote_filesystem" if remote else "local_filesystem"
        self._is_polling = observer == "polling"
        self._log.emit(
            events.DROP_WATCHED,
            drop=self._drop,
            path=self._path,
            observer=observer,
            filesystem=filesystem,
            reason=reason,
        )
        if not self._is_polling:
            self._start()

    def close(self) -> None:
        """Stop the watcher."""
        self._requested_at = None
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None

    def scan_every(self) -> float:
        """Return the seconds until the next scan."""
        every = self._config.rescan_every.total_seconds()
        return min(every, _POLL_EVERY) if self._is_polling or self.is_degraded else every

    def max_wait(self) -> float:
        """Return the seconds after which `recover_lost_events` must be called again."""
        return 1.0 if not self._is_polling else self.scan_every()

    def event_received(self) -> None:
        """Record that an event arrived, which proves that the watcher works."""
        self._requested_at = None

    def recover_lost_events(self) -> bool:
        """Return whether events were lost since the last call, so that a scan is due.

        A loss is logged. If the test event is lost, the watcher is restarted.
        """
        if self._requested_at is not None and time.monotonic() - self._requested_at > _TEST_EVENT_TIMEOUT:
            self._log_degraded("test_event_lost", "the watcher reported no event when the folder was opened")
            self._restart()
            return True
        if self._watcher is None or not self._watcher.pop_overflow():
            return False
        self._log_degraded(
            "overflow",
            "the event queue of the kernel overflowed",
            "raise fs.inotify.max_queued_events (sysctl)",
        )
        self._log_watch_state(self._watcher)
        return True

    def check_and_restart(self) -> bool:
        """Restart a watcher that does not work; return whether it has worked since the last check."""
        if not self._folder.is_in_place():
            self._log_degraded("replaced", "the folder was moved, deleted, unmounted or mounted over")
            if self._is_accessible(self._folder.reopen):
                self._restart()
            return False
        was_failing = self._root_failing
        if not self._is_accessible(self._folder.check_readable):
            return False
        if was_failing:
            self._restart()
            return False
        if self._is_polling:
            return False
        if self._watcher is None or not self._watcher.is_alive():
            if self._watcher is not None:
                self._log_degraded("dead", "a thread of the watcher has ended")
            self._restart()
            return False
        if self._watcher.is_partial():
            self._restart()
            return False
        return self._request_test_event(self._watcher)

    def lost_event(self, relpath: bytes) -> None:
        """Log that a scan found a file for which no event arrived, and restart the watcher."""
        self._log_degraded("event_lost", f"no event arrived for {as_text(relpath)}")
        self._restart()

    def root_failed(self, error: OSError) -> None:
        """Log, once, that the folder can't be read; `check_and_restart` recovers once it can be."""
        if not self._root_failing:
            self._log.emit(
                events.DROP_FAILED,
                drop=self._drop,
                path=self._path,
                error=error.strerror,
                hint="make the folder readable and writable for the daemon's user; retried at each rescan",
            )
        self._root_failing = True
        self._degraded_reason = self._degraded_reason or "unreadable"

    def _request_test_event(self, watcher: Watcher) -> bool:
        """Request a test event unless one is pending; return False if the folder is no longer watched.

        Without it, a quiet folder looks like a broken watcher.
        """
        if self._requested_at is not None:
            return True
        self._requested_at = time.monotonic()  # before the request: the event arrives in another thread
        try:
            is_watched = watcher.request_test_event()
        except OSError:
            self._requested_at = None  # the scan logs a folder that can't be read
            return True
        if not is_watched:
            self._log_degraded("removed", "the kernel no longer watches the folder")
            self._restart()
        return is_watched

    def _is_accessible(self, access: Callable[[], None]) -> bool:
        """Return whether an access to the folder succeeds; log it if not."""
        try:
            access()
        except OSError as error:
            self.root_failed(error)
            return False
        self._root_failing = False
        return True

    def _restart(self) -> None:
        self.close()
        if self._is_polling:
            self._log_recovered()
        else:
            self._start()

    def _start(self) -> None:
        watcher = Watcher(self._folder, self._on_event, self._is_ignored, recursive=self._config.recursive)
        try:
            watcher.start()
        except WatchError as error:
            self._log_degraded("refused", error.message, error.hint)
            return
        self._watcher = watcher
        self._log_watch_state(watcher)

    def _log_watch_state(self, watcher: Watcher) -> None:
        if watcher.is_partial():
            self._log_degraded("refused", "some directories are not watched", LIMITS_HINT)
        else:
            self._log_recovered()

    def _log_degraded(self, reason: str, error: str, hint: str = _NO_ACTION_HINT) -> None:
        if reason != self._degraded_reason:
            self._log.emit(
                events.WATCH_DEGRADED,
                drop=self._drop,
                path=self._path,
                reason=reason,
                error=error,
                hint=hint or _NO_ACTION_HINT,
            )
        self._degraded_reason = reason

    def _log_recovered(self) -> None:
        if self._degraded_reason:
            observer = "polling" if self._is_polling else "inotify"
            self._log.emit(events.WATCH_RECOVERED, drop=self._drop, path=self._path, observer=observer)
        self._degraded_reason = ""
