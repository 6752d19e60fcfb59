"""The events of a drop folder, by inotify through watchdog.

Events make the intake fast; the scan makes sure that no file is missed.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field

from watchdog.events import (
    DirCreatedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify import InotifyEmitter, InotifyObserver, InotifyWatchGroup
from watchdog.observers.inotify_c import (
    InotifyConstants,
    InotifyEvent,
    Mask,
    WatchDescriptor,
    inotify_add_watch,
)
from watchdog.observers.inotify_move_event_grouper import (
    GroupedInotifyEvent,
    InotifyMoveEventGrouper,
    PathedInotifyEvent,
)

from backupd.core.errors import BackupdError
from backupd.dropfolder.folder import DirectoryCache, DropFolder

IsIgnored = Callable[[bytes], bool]
"""Returns whether a directory, given by its absolute path, is not watched."""

OnEvent = Callable[[bytes, bool], None]
"""Called with the absolute path of an event and whether it is a directory."""

LIMITS_HINT = "raise fs.inotify.max_user_watches and max_user_instances (sysctl) if a limit is reached"

_THREADS_HINT = "raise the limit of threads (`TasksMax=` of the service, `ulimit -u`)"

_EVENT_TYPES: list[type[FileSystemEvent]] = [FileClosedEvent, FileCreatedEvent, DirCreatedEvent]

_MASK = Mask(
    InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_DELETE_SELF
)
"""Events of files that arrive; the daemon must not be woken by its own reads and moves.

Without IN_MOVED_FROM, watchdog reports a move into the folder as a creation. With it, watchdog would delay
every event that follows a file's move out of the folder by half a second.
"""

_OVERFLOW_LOGGERS = ("watchdog.observers.inotify_c", "watchdog.observers.inotify")
"""The loggers to which watchdog reports an overflow of the kernel's event queue."""


class WatchError(BackupdError):
    """A folder cannot be watched; only scans find its files."""


class Watcher:
    """Reports the events of one drop folder by inotify, with threads and an event queue of its own.

    A failure of these affects no other drop. An overflow, however, is reported for every drop: watchdog only
    logs it, to loggers that all watchers share.
    """

    def __init__(
        self, folder: DropFolder, on_event: OnEvent, is_ignored: IsIgnored, *, recursive: bool
    ) -> None:
        self._folder = folder
        self._path = folder.path
        self._is_ignored = is_ignored
        self._handler = _Handler(on_event)
        self._recursive = recursive
        self._observer: BaseObserver | None = None
        self._overflow = _OverflowFlag()

    def start(self) -> None:
        """Start watching; raise WatchError if inotify or a thread is not available."""
        try:
            self._observer = DropObserver(self._folder, self._is_ignored)
            self._observer.schedule(
                self._handler, self._path, recursive=self._recursive, event_filter=_EVENT_TYPES
            )
            self._observer.start()
        except OSError as error:
            self.stop()
            message = f"inotify cannot watch {self._path} ({error.strerror or error})"
            raise WatchError(message, LIMITS_HINT) from error
        except RuntimeError as error:  # the limit of threads is reached
            self.stop()
            raise WatchError(f"no thread for the watcher of {self._path} ({error})", _THREADS_HINT) from error
        self._overflow.attach()

    def stop(self) -> None:
        """Stop watching and wait for the threads."""
        observer, self._observer = self._observer, None
        self._overflow.detach()
        logging.getLogger("watchdog.observers.inotify").addFilter(_is_no_stop_warning)
        if observer is None:
            return
        if observer.is_alive():
            observer.stop()
            observer.join(5)
        else:
            observer.on_thread_stop()

    def is_alive(self) -> bool:
        """Return whether every thread that delivers events is running."""
        observer = self._observer
        if observer is None or not observer.is_alive() or not observer.emitters:
            return False
        reader = getattr(observer, "_inotify_fd", None)
        return all(e.is_alive() for e in observer.emitters) and (reader is None or reader.is_alive())

    def request_test_event(self) -> bool:
        """Provoke the test event, an event of `path/`; return False if the folder is no longer watched.

        Raises OSError if the folder can't be opened.
        """
        return all(watches is not None and watches.provoke_event() for watches in self._all_watches())

    def is_partial(self) -> bool:
        """Return whether some directories are not watched because a limit is reached."""
        return any(watches is not None and watches.is_partial for watches in self._all_watches())

    def pop_overflow(self) -> bool:
        """Return whether the event queue of this or another drop has overflowed since the last call."""
        return self._overflow.pop()

    def _all_watches(self) -> list[DropWatches | None]:
        emitters = self._observer.emitters if self._observer is not None else ()
        return [emitter._inotify for emitter in emitters if isinstance(emitter, DropEmitter)]  # noqa: SLF001


class _Handler(FileSystemEventHandler):
    """Passes paths on, nothing else: it runs under the observer's lock."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    # overrides FileSystemEventHandler
    def on_any_event(self, event: FileSystemEvent) -> None:
        self._on_event(os.fsencode(event.src_path), event.is_directory)


class DropObserver(InotifyObserver):
    """watchdog's observer, with a `DropEmitter` for the folder."""

    def __init__(self, folder: DropFolder, is_ignored: IsIgnored) -> None:
        super().__init__()
        attributes = {"folder": folder, "is_ignored": staticmethod(is_ignored)}
        # watchdog creates the emitter itself, from this class and with its own arguments only
        self._emitter_class = type("_EmitterOfFolder", (DropEmitter,), attributes)


class DropEmitter(InotifyEmitter):
    """watchdog's emitter, with `DropWatches` on the folder."""

    folder: DropFolder
    is_ignored: IsIgnored
    _inotify: DropWatches | None

    # overrides InotifyEmitter
    def on_thread_start(self) -> None:
        """Add the watches; raise OSError if the kernel refuses."""
        self._inotify = DropWatches(
            self._inotify_fd,
            os.fsencode(self.watch.path),
            event_mask=self.get_event_mask_from_filter(),
            is_recursive=self.watch.is_recursive,
            folder=self.folder,
            is_ignored=self.is_ignored,
        )

    # overrides InotifyEmitter
    def get_event_mask_from_filter(self) -> Mask:
        """Return the mask of the events that the kernel reports."""
        return _MASK

    # overrides InotifyEmitter
    def build_and_queue_event(self, event: GroupedInotifyEvent, *, full_events: bool = False) -> None:
        """Queue an event as `InotifyEmitter` does, but one event only for a directory that was moved in.

        The intake scans that directory. watchdog would queue an event for each entry, by a recursive call for
        each level.
        """
        if isinstance(event, PathedInotifyEvent) and event.ev.is_moved_to and event.ev.is_directory:
            self.queue_event(DirCreatedEvent(self._decode_path(event.path)))
        else:
            super().build_and_queue_event(event, full_events=full_events)


@dataclass
class DropWatches(InotifyWatchGroup):
    """The inotify watches on a tree without its ignored directories: the size of `sent/` costs nothing.

    Directories are opened below the drop folder's descriptor and watched through that descriptor, so that a
    directory that is replaced by a link cannot make the daemon watch a directory outside.
    """

    folder: DropFolder = field(kw_only=True)
    is_ignored: IsIgnored = lambda _: False
    is_partial: bool = False
    """Whether some directory is not watched because a limit of the kernel is reached."""

    # A moved directory keeps its watch. watchdog learns of the move by IN_MOVED_FROM, which the mask leaves
    # out; the methods below keep one path for each watch and one watch for each path instead.

    # overrides InotifyWatchGroup
    def __post_init__(self) -> None:
        self._move_event_grouper = _NoMoveGrouping()
        super().__post_init__()

    def provoke_event(self) -> bool:
        """Open the folder so that the test event arrives; return False if its watch is gone.

        For a directory that is already watched the kernel returns the same watch and changes its mask, so
        openings are reported for a moment. The lock is needed because watchdog renews all watches after an
        overflow.
        """
        queue = self._inotify_fd._inotify_fd  # noqa: SLF001 -- watchdog cannot change a mask
        folder = _proc_path(self.folder.fileno())
        with self._lock:
            watch = inotify_add_watch(queue, folder, self._mask | InotifyConstants.IN_OPEN)
            if watch == -1:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            if watch != self._active_callbacks_by_path.get(self.path):
                return False
            try:
                os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            finally:
                inotify_add_watch(queue, folder, self._mask)
        return True

    # overrides InotifyWatchGroup
    def on_event(self, event: InotifyEvent) -> None:
        """Handle an event as watchdog does; an opening of the folder becomes the test event."""
        if not event.is_open:
            super().on_event(event)
        elif not event.name:
            closed = InotifyEvent(event.wd, InotifyConstants.IN_CLOSE_WRITE, 0, b"")
            self._move_event_grouper.put_event(PathedInotifyEvent(closed, self.path + b"/"))

    @property
    def _mask(self) -> Mask:
        """The event mask for a directory that is named by its descriptor, which is a link in /proc."""
        return Mask(self.event_mask & ~InotifyConstants.IN_DONT_FOLLOW)

    # overrides InotifyWatchGroup
    def _add_all_callbacks(self, path: bytes) -> None:
        if path != self.path and self.is_ignored(path):
            return
        pending = [path]
        with closing(DirectoryCache(self.folder)) as directories:
            while pending:  # os.walk is recursive before Python 3.12
                path = pending.pop()
                try:
                    directory = directories.directory(path[len(self.path) :])
                except OSError as error:
                    self._on_refused(path, error)
                    continue
                self._watch(path, directory)
                if self.is_recursive:
                    pending += self._subdirectories(path, directory)

    def _watch(self, path: bytes, directory: int) -> None:
        try:
            watch = self._add_watch(directory)
        except OSError as error:
            self._on_refused(path, error)
            return
        former_path = self._active_callbacks_by_watch.get(watch)
        if former_path is not None and self._active_callbacks_by_path.get(former_path) == watch:
            del self._active_callbacks_by_path[former_path]
        self._active_callbacks_by_path[path] = watch
        self._active_callbacks_by_watch[watch] = path

    def _add_watch(self, directory: int) -> WatchDescriptor:
        """Add a watch as `add_callback` does, without its warning about a moved directory."""
        queue = self._inotify_fd
        with queue._lock:  # noqa: SLF001
            watch = queue._get_or_create_watch(_proc_path(directory), self._mask)  # noqa: SLF001
            watch.callbacks[self._id] = self._callback
            return watch.wd

    # overrides InotifyWatchGroup
    def _remove_watch_internally(self, wd: WatchDescriptor) -> None:
        path = self._active_callbacks_by_watch.pop(wd, None)
        if path is not None and self._active_callbacks_by_path.get(path) == wd:
            del self._active_callbacks_by_path[path]

    def _on_refused(self, path: bytes, error: OSError) -> None:
        if path == self.path:
            raise error
        self.is_partial |= error.errno in (errno.ENOSPC, errno.ENOMEM)

    def _subdirectories(self, path: bytes, directory: int) -> Iterator[bytes]:
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                below = path + b"/" + os.fsencode(entry.name)
                if entry.is_dir(follow_symlinks=False) and not self.is_ignored(below):
                    yield below

    # overrides InotifyWatchGroup
    def _recursive_simulate(self, src_path: bytes) -> list[InotifyEvent]:  # noqa: ARG002
        """Simulate no events: the intake scans a new directory, which is watched by then."""
        return []


class _NoMoveGrouping(InotifyMoveEventGrouper):
    """Queues events without a search for the other half of a move, which the mask leaves out."""

    # overrides InotifyMoveEventGrouper
    def put_event(self, event: PathedInotifyEvent) -> None:
        self._queue.put(event)

    # overrides InotifyMoveEventGrouper
    def get_queued_moved_from_event(self, cookie: int) -> PathedInotifyEvent | None:  # noqa: ARG002
        return None


class _OverflowFlag(logging.Handler):
    """Set when watchdog logs an overflow of a kernel queue of any drop, which it reports in no other way."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._flag = threading.Event()

    def attach(self) -> None:
        for name in _OVERFLOW_LOGGERS:
            logging.getLogger(name).addHandler(self)

    def detach(self) -> None:
        for name in _OVERFLOW_LOGGERS:
            logging.getLogger(name).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.getMessage().lower():
            self._flag.set()

    def pop(self) -> bool:
        was_set = self._flag.is_set()
        self._flag.clear()
        return was_set


def _proc_path(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


def _is_no_stop_warning(record: logging.LogRecord) -> bool:
    """Filter the warning that watchdog logs for an emitter that is being stopped."""
    return "when the thread is inactive" not in record.getMessage()
