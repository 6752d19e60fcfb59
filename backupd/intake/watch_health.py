"""The health of a drop folder's watcher: detects lost events and restarts the watcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from watchdog.observers.api import EventQueue

from backupd.core.drop_problem import FOLDER_FAILED, DropState
from backupd.core.filesystems import default_stable_for, is_remote
from backupd.core.mountinfo import MountEntry
from backupd.core.names import as_text
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.filesystem import blind_spot, filesystem_of, mounts_of
from backupd.dropfolder.folder import FolderInUseError
from backupd.intake.problem_list import ProblemList
from backupd.intake.watcher import Watcher, WatchFault
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_POLL_EVERY = 5.0
"""Seconds between scans of a folder without events, unless `rescan_every` is shorter."""

_LIMITS_HINT = (
    "raise fs.inotify.max_user_watches and max_user_instances (sysctl), or the limit of threads (`TasksMax=`"
    " of the service, `ulimit -u`), if one is reached"
)

_REPLACED = WatchFault("replaced", "the folder was moved, deleted, unmounted or mounted over")


class WatchHealth:
    """Detects lost events of one drop folder, and restarts a watcher that does not work.

    It also chooses between the watcher, which uses inotify, and frequent scans where inotify does not work.
    `on_usable` is called when the folder can be read for the first time, or again.
    """

    def __init__(
        self,
        drop: Drop,
        problems: ProblemList,
        log: EventLog,
        queue: EventQueue,
        on_usable: Callable[[], None] = lambda: None,
    ) -> None:
        self._drop = drop
        self._config = drop.config
        self._folder = drop.folder
        self._problems = problems
        self._log = log
        self._path = str(drop.config.path)
        self._queue = queue
        self._on_usable = on_usable
        self._watcher: Watcher | None = None
        self._is_open = False
        self._is_polling = False
        self._state: DropState | None = None
        """The state at the last start of the watcher, without its present fault."""
        self._watched = ("", "")
        """The observer and the filesystem that were logged last."""
        self._degraded_reason = ""
        """The reason of the last `watch.degraded`; empty while events arrive."""
        self.root_is_failing = False
        """Whether the folder can't be read."""
        self._unwatched: frozenset[bytes] = frozenset()
        """The directories that were not watched at the last check."""

    @property
    def is_degraded(self) -> bool:
        """Whether files are found by scans only, if at all."""
        return bool(self._degraded_reason) or self.root_is_failing

    def open(self) -> None:
        """Open the folder, choose between inotify and polling, log the choice and start.

        If the folder cannot be opened, each call of `check_and_restart` tries it again.
        """
        self._is_accessible(self._open)

    def _open(self) -> None:
        self._folder.reopen()
        self._choose_observer()
        self._is_open = True
        self._restart()

    def _choose_observer(self) -> None:
        """Adapt to the filesystem that holds the folder now, and log it if it is another one."""
        filesystem = filesystem_of(self._path)
        observer = self._config.observer
        reason = "configured"
        if observer == "auto":
            remote = is_remote(filesystem)
            observer = "polling" if remote else "inotify"
            reason = "remote_filesystem" if remote else "local_filesystem"
        self._is_polling = observer == "polling"
        unseen = blind_spot(self._folder.fileno(), filesystem)
        self._state = DropState(self._drop.name, observer, filesystem, "", unseen)
        if self._watched == (observer, filesystem):
            return
        self._watched = observer, filesystem
        self._log.emit(
            events.DROP_WATCHED,
            drop=self._drop.name,
            path=self._path,
            observer=observer,
            filesystem=filesystem,
            reason=reason,
            stable_for_s=self.stable_for,
            blind_spot=unseen or None,
        )

    @property
    def state(self) -> DropState | None:
        """The state of the drop, None while the folder was not opened yet."""
        return replace(self._state, fault=self._degraded_reason) if self._state else None

    def close(self) -> None:
        """Stop the watcher."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.close()

    def scan_every(self) -> float:
        """Return the seconds until the next scan."""
        every = self._config.rescan_every.total_seconds()
        are_events_missing = self._config.observer == "auto" and any(
            is_remote(mount.filesystem) for mount in self._mounts()
        )
        if self._is_polling or self.is_degraded or are_events_missing:
            return min(every, _POLL_EVERY)
        return every

    @property
    def stable_for(self) -> float:
        """The seconds for which a file must be unchanged; the slowest mount in the folder decides."""
        configured = self._config.stable_for
        return default_stable_for(self._mounts()) if configured is None else configured.total_seconds()

    def _mounts(self) -> list[MountEntry]:
        try:
            return mounts_of(self._path)
        except OSError:
            return []

    def check_and_restart(self) -> bool:
        """Restart a watcher that does not work; return whether it has worked since the last check."""
        if not self._is_open:
            self.open()
            return False
        if not self._folder.is_in_place():
            self._log_degraded(_REPLACED)
            self._is_accessible(self._open)
            return False
        was_failing = self.root_is_failing
        if not self._is_accessible(self._folder.check_readable):
            return False
        if was_failing:
            self._restart()
            return False
        if self._is_polling:
            return False
        if self._watcher is None or not self._watcher.is_working():
            if self._watcher is not None:
                self._log_degraded(self._watcher.fault)
            self._restart()
            return False
        self._unwatched = frozenset(self._watcher.refused)
        self._watcher.retry()
        self._log_watch_state(self._watcher)
        return True

    def expects_event(self, relpath: bytes) -> bool:
        """Return whether the directory of a file was watched before the last check."""
        directory = relpath
        while directory:
            directory = directory.rpartition(b"/")[0]
            if directory in self._unwatched:
                return False
        return True

    def lost_event(self, relpath: bytes) -> None:
        """Log that a scan found a file for which no event arrived, and restart the watcher."""
        self._log_degraded(WatchFault("event_lost", f"no event arrived for {as_text(relpath)}"))
        self._restart()

    def root_failed(self, error: OSError) -> None:
        """Log, once, that the folder can't be read; `check_and_restart` recovers once it can be."""
        text = error.strerror or str(error)
        hint = "make the folder readable and writable for the daemon's user; retried at each rescan"
        if isinstance(error, FolderInUseError):
            hint = error.hint
        self._folder.is_usable = False
        if self._problems.add(b"", FOLDER_FAILED, text, hint):
            self._log.emit(events.DROP_FAILED, drop=self._drop.name, path=self._path, error=text, hint=hint)
        self.root_is_failing = True
        self._degraded_reason = self._degraded_reason or "unreadable"

    def _is_accessible(self, access: Callable[[], None]) -> bool:
        """Return whether an access to the folder succeeds; log it if not."""
        try:
            access()
        except OSError as error:
            self.root_failed(error)
            return False
        if self.root_is_failing:
            self._problems.remove(b"")
        self.root_is_failing = False
        if not self._folder.is_usable:
            self._folder.is_usable = True
            self._on_usable()
        return True

    def _restart(self) -> None:
        self.close()
        if self._is_polling:
            self._log_recovered()
        else:
            self._start()

    def _start(self) -> None:
        try:
            self._watcher = Watcher(self._drop, self._queue)
            self._watcher.start()
        except (OSError, RuntimeError) as error:  # Python raises the latter if a thread is refused
            self.close()
            self._log_degraded(
                WatchFault("refused", f"{self._path} cannot be watched: {error}", _LIMITS_HINT)
            )
        else:
            self._log_watch_state(self._watcher)

    def _log_watch_state(self, watcher: Watcher) -> None:
        if watcher.is_limited():
            self._log_degraded(WatchFault("refused", "some directories are not watched", _LIMITS_HINT))
        else:
            self._log_recovered()

    def _log_degraded(self, fault: WatchFault) -> None:
        if fault.reason != self._degraded_reason:
            self._log.emit(
                events.WATCH_DEGRADED,
                drop=self._drop.name,
                path=self._path,
                reason=fault.reason,
                error=fault.error,
                hint=fault.hint,
            )
        self._degraded_reason = fault.reason

    def _log_recovered(self) -> None:
        if self._degraded_reason:
            observer = "polling" if self._is_polling else "inotify"
            self._log.emit(events.WATCH_RECOVERED, drop=self._drop.name, path=self._path, observer=observer)
        self._degraded_reason = ""
