"""Whether we see what happens in a drop folder: which way, and what is done when not."""

from __future__ import annotations

import time
from collections.abc import Callable

from backupd.dropfolder.drop import Drop
from backupd.dropfolder.filesystem import filesystem_of, is_remote
from backupd.intake.watcher import LIMITS_HINT, Ignores, OnEvent, Watcher, WatchError
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_POLL_EVERY = 5.0
"""Seconds between scans where there are no events, unless `rescan_every` is less."""

_SILENT = 5.0
"""Seconds after which an event that was provoked will not come."""


class WatchHealth:
    """The eyes on one drop folder: inotify where it works, else frequent scans."""

    def __init__(
        self,
        drop: Drop,
        log: EventLog,
        notice: OnEvent,
        ignores: Ignores,
    ) -> None:
        self._drop = drop.name
        self._config = drop.config
        self._folder = drop.folder
        self._log = log
        self._path = str(drop.config.path)
        self._notice = notice
        self._ignores = ignores
        self._watcher: Watcher | None = None
        self._polling = False
        self._blind = ""
        """Why we see nothing, as it was last said; empty while we see."""
        self._root_failing = False
        self._asked: float | None = None
        """When the watcher was last asked for a sign of life that has not come yet, monotonic."""

    @property
    def is_degraded(self) -> bool:
        """Whether only the scan brings archives, if anything does."""
        return bool(self._blind) or self._root_failing

    def open(self) -> None:
        """Choose how to look, say so, and begin."""
        filesystem = filesystem_of(self._path)
        chosen = self._config.observer
        reason = "configured"
        if chosen == "auto":
            remote = is_remote(filesystem)
            chosen = "polling" if remote else "inotify"
            reason = "remote writers make no events" if remote else "local filesystem"
        self._polling = chosen == "polling"
        self._log.emit(
            events.DROP_WATCHED,
            drop=self._drop,
            path=self._path,
            observer=chosen,
            filesystem=filesystem,
            reason=reason,
        )
        if not self._polling:
            self._start()

    def close(self) -> None:
        """Stop looking."""
        self._asked = None
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None

    def scan_every(self) -> float:
        """Return the seconds until the next scan."""
        every = self._config.rescan_every.total_seconds()
        return min(every, _POLL_EVERY) if self._polling or self.is_degraded else every

    def patience(self) -> float:
        """Return for how many seconds an overflow may go unnoticed."""
        return 1.0 if not self._polling else self.scan_every()

    def event_received(self) -> None:
        """Note that an event came, which only a watcher that sees can tell of."""
        self._asked = None

    def has_missed_events(self) -> bool:
        """Tell whether events were lost since last asked, so that a scan is due; it is said."""
        if self._asked is not None and time.monotonic() - self._asked > _SILENT:
            self._say_blind("silent", "the folder was opened, and no event told of it", "")
            self._restart()
            return True
        if self._watcher is None or not self._watcher.pop_overflow():
            return False
        self._say_blind(
            "overflow", "the kernel's queue was full", "raise fs.inotify.max_queued_events (sysctl)"
        )
        self._say_what_is_seen(self._watcher)
        return True

    def check(self) -> bool:
        """Look after the eyes; return whether they were open since the last check."""
        if not self._folder.is_in_place():
            self._say_blind("replaced", "the folder was moved, deleted, unmounted or mounted over", "")
            if self._works(self._folder.reopen):
                self._restart()
            return False
        was_failing = self._root_failing
        if not self._works(self._folder.check_readable):
            return False
        if was_failing:
            self._restart()
            return False
        if self._polling:
            return False
        if self._watcher is None or not self._watcher.is_alive():
            if self._watcher is not None:
                self._say_blind("dead", "a thread of the watcher has ended", "")
            self._restart()
            return False
        if self._watcher.is_partial():
            self._restart()
            return False
        return self._ask(self._watcher)

    def _ask(self, watcher: Watcher) -> bool:
        """Ask for a sign of life, where none is awaited: a quiet folder and a blind watcher look the same."""
        if self._asked is not None:
            return True
        self._asked = time.monotonic()  # before: the answer comes in another thread
        try:
            watched = watcher.request_sign_of_life()
        except OSError:
            self._asked = None  # the scan tells of a folder that can't be read
            return True
        if not watched:
            self._say_blind("removed", "the kernel watches the folder no more", "")
            self._restart()
        return watched

    def missed_event(self, relpath: bytes) -> None:
        """Say that the scan found a file that no event had told of, and begin to watch anew."""
        self._say_blind("missed", f"no event came for {relpath!r}", "")
        self._restart()

    def root_failed(self, error: OSError) -> None:
        """Say, once, that the folder can't be read; `check` mends it as soon as it can be."""
        if not self._root_failing:
            self._log.emit(
                events.DROP_FAILED,
                drop=self._drop,
                path=self._path,
                error=error.strerror,
                hint="make the folder readable and writable for the daemon's user; it is tried again",
            )
        self._root_failing = True
        self._blind = self._blind or "unreadable"

    def _works(self, access: Callable[[], None]) -> bool:
        """Return whether the folder can be had; that it can't is said."""
        try:
            access()
        except OSError as error:
            self.root_failed(error)
            return False
        self._root_failing = False
        return True

    def _restart(self) -> None:
        self.close()
        if self._polling:
            self._say_restored()
        else:
            self._start()

    def _start(self) -> None:
        watcher = Watcher(self._folder, self._notice, self._ignores, recursive=self._config.recursive)
        try:
            watcher.start()
        except WatchError as error:
            self._say_blind("refused", error.message, error.hint)
            return
        self._watcher = watcher
        self._say_what_is_seen(watcher)

    def _say_what_is_seen(self, watcher: Watcher) -> None:
        if watcher.is_partial():
            self._say_blind("refused", f"{self._path}: some directories are not watched", LIMITS_HINT)
        else:
            self._say_restored()

    def _say_blind(self, reason: str, error: str, hint: str) -> None:
        if reason != self._blind:
            self._log.emit(
                events.WATCH_DEGRADED,
                drop=self._drop,
                path=self._path,
                reason=reason,
                error=error,
                hint=hint or "nothing: the scan finds what was missed, and the watcher is made anew",
            )
        self._blind = reason

    def _say_restored(self) -> None:
        if self._blind:
            observer = "polling" if self._polling else "inotify"
            self._log.emit(events.WATCH_RECOVERED, drop=self._drop, path=self._path, observer=observer)
        self._blind = ""
