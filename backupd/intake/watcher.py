"""Events of a drop folder, by watchdog; they only make it quick, the scan makes it correct."""

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

_MASK = Mask(
    InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_DELETE_SELF
)
"""What comes, and nothing of what goes: our own opens, closes and moves must not wake us.

Without the other half of a move watchdog takes it for a creation; with it, it would hold back for half a
second whatever comes after a file that was moved away.
"""

Ignores = Callable[[bytes], bool]
"""Called with the absolute path of a directory."""


class _Ungrouped(InotifyMoveEventGrouper):
    """Looks for no other half of a move, of which none comes: it would look through all that waits."""

    def put_event(self, event: PathedInotifyEvent) -> None:
        self._queue.put(event)

    def get_queued_moved_from_event(self, cookie: int) -> PathedInotifyEvent | None:  # noqa: ARG002
        return None


@dataclass
class Watches(InotifyWatchGroup):
    """The watches on a tree but for what is ignored in it: nothing that lies in `sent` costs anything.

    Directories are opened below the drop folder's descriptor, and watched by that: nobody who swaps one for
    a link can have us look at what is outside.
    """

    folder: DropFolder = field(kw_only=True)
    ignores: Ignores = lambda _: False
    is_partial: bool = False
    """Whether the kernel had no watch left for some directory."""

    # A directory that was moved keeps its watch. watchdog counts on hearing of that; we need not, as long
    # as there is one path for a watch and one watch for a path.

    def _watch(self, path: bytes, directory: int) -> None:
        try:
            watch = self._watch_of(directory)
        except OSError as error:
            self._refused(path, error)
            return
        before = self._active_callbacks_by_watch.get(watch)
        if before is not None and self._active_callbacks_by_path.get(before) == watch:
            del self._active_callbacks_by_path[before]
        self._active_callbacks_by_path[path] = watch
        self._active_callbacks_by_watch[watch] = path

    def _watch_of(self, directory: int) -> WatchDescriptor:
        """Do as `add_callback`, which warns, at length, of a directory that moved and kept its watch."""
        queue = self._inotify_fd
        with queue._lock:  # noqa: SLF001
            watch = queue._get_or_create_watch(_by_number(directory), self._mask)  # noqa: SLF001
            watch.callbacks[self._id] = self._callback
            return watch.wd

    def ask(self) -> bool:
        """Open the folder under the eyes of its watch; return False where the watch is gone.

        The kernel gives the same number for a directory that is watched already, and with it what else is to
        be told of it: for a moment, that somebody opens it. Under the lock: after an overflow watchdog makes
        all watches anew.
        """
        queue = self._inotify_fd._inotify_fd  # noqa: SLF001 -- watchdog knows no changed mask
        folder = _by_number(self.folder.fileno())
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

    def on_event(self, event: InotifyEvent) -> None:
        """See `WatchCallback.on_event`; an opening of the folder is passed on as an event of `path/`."""
        if not event.is_open:
            super().on_event(event)
        elif not event.name:
            closed = InotifyEvent(event.wd, InotifyConstants.IN_CLOSE_WRITE, 0, b"")
            self._move_event_grouper.put_event(PathedInotifyEvent(closed, self.path + b"/"))

    def _remove_watch_internally(self, wd: WatchDescriptor) -> None:
        path = self._active_callbacks_by_watch.pop(wd, None)
        if path is not None and self._active_callbacks_by_path.get(path) == wd:
            del self._active_callbacks_by_path[path]

    def __post_init__(self) -> None:
        self._move_event_grouper = _Ungrouped()
        super().__post_init__()

    def _add_all_callbacks(self, path: bytes) -> None:
        if path != self.path and self.ignores(path):
            return
        waiting = [path]
        with closing(DirectoryCache(self.folder)) as descent:
            while waiting:  # os.walk calls itself for each level, before Python 3.12
                here = waiting.pop()
                try:
                    directory = descent.directory(here[len(self.path) :])
                except OSError as error:
                    self._refused(here, error)
                    continue
                self._watch(here, directory)
                if self.is_recursive:
                    waiting += self._directories(here, directory)

    def _refused(self, path: bytes, error: OSError) -> None:
        if path == self.path:
            raise error
        self.is_partial |= error.errno in (errno.ENOSPC, errno.ENOMEM)

    def _directories(self, path: bytes, directory: int) -> Iterator[bytes]:
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                below = path + b"/" + os.fsencode(entry.name)
                if entry.is_dir(follow_symlinks=False) and not self.ignores(below):
                    yield below

    @property
    def _mask(self) -> Mask:
        """What is asked of a directory that is named by its descriptor, which is a link in /proc."""
        return Mask(self.event_mask & ~InotifyConstants.IN_DONT_FOLLOW)

    def _recursive_simulate(self, src_path: bytes) -> list[InotifyEvent]:  # noqa: ARG002
        """Make up no events: of a new directory all is looked through, and that is watched by then."""
        return []


def _by_number(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


class Emitter(InotifyEmitter):
    """Tells of a drop folder's events."""

    folder: DropFolder
    ignores: Ignores
    _inotify: Watches | None

    def on_thread_start(self) -> None:
        """Begin to watch; raises OSError where the kernel will not."""
        self._inotify = Watches(
            self._inotify_fd,
            os.fsencode(self.watch.path),
            event_mask=self.get_event_mask_from_filter(),
            is_recursive=self.watch.is_recursive,
            folder=self.folder,
            ignores=self.ignores,
        )

    def get_event_mask_from_filter(self) -> Mask:
        """Return what the kernel is asked for."""
        return _MASK

    def build_and_queue_event(self, event: GroupedInotifyEvent, *, full_events: bool = False) -> None:
        """See `InotifyEmitter`; of a directory that was moved in, we look through all ourselves.

        watchdog would tell of each entry in it, by calling itself for each level.
        """
        if isinstance(event, PathedInotifyEvent) and event.ev.is_moved_to and event.ev.is_directory:
            self.queue_event(DirCreatedEvent(self._decode_path(event.path)))
        else:
            super().build_and_queue_event(event, full_events=full_events)


class Observer(InotifyObserver):
    """Hands the events on, with emitters of ours."""

    def __init__(self, folder: DropFolder, ignores: Ignores) -> None:
        super().__init__()
        here = {"folder": folder, "ignores": staticmethod(ignores)}
        self._emitter_class = type("_EmitterHere", (Emitter,), here)


_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileCreatedEvent, DirCreatedEvent]

_OVERFLOW_LOGGERS = ("watchdog.observers.inotify_c", "watchdog.observers.inotify")

LIMITS_HINT = "raise fs.inotify.max_user_watches and max_user_instances (sysctl) if a limit is reached"

_THREADS_HINT = "raise the limit of threads (`TasksMax=` of the service, `ulimit -u`)"

OnEvent = Callable[[bytes, bool], None]
"""Called with an absolute path and whether it is a directory."""


class WatchError(BackupdError):
    """The kernel gives us no events for a folder; the scan has to do alone."""


class _Handler(FileSystemEventHandler):
    """Passes paths on, nothing else: it runs under the observer's lock."""

    def __init__(self, notice: OnEvent) -> None:
        self._notice = notice

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._notice(os.fsencode(event.src_path), event.is_directory)


class Watcher:
    """Watches one drop folder by inotify; an observer of its own, so that no drop can blind another."""

    def __init__(self, folder: DropFolder, notice: OnEvent, ignores: Ignores, *, recursive: bool) -> None:
        self._folder = folder
        self._path = folder.path
        self._ignores = ignores
        self._handler = _Handler(notice)
        self._recursive = recursive
        self._observer: BaseObserver | None = None
        self._overflow = _OverflowFlag()

    def start(self) -> None:
        """Begin to watch; raises WatchError where the kernel will not."""
        try:
            self._observer = Observer(self._folder, self._ignores)
            self._observer.schedule(
                self._handler, self._path, recursive=self._recursive, event_filter=_EVENTS
            )
            self._observer.start()
        except OSError as error:
            self.stop()
            raise WatchError(f"{self._path}: no events ({error.strerror or error})", LIMITS_HINT) from error
        except RuntimeError as error:  # a limit of threads
            self.stop()
            raise WatchError(f"{self._path}: no events ({error})", _THREADS_HINT) from error
        self._overflow.attach()

    def stop(self) -> None:
        """Stop watching; the threads are waited for."""
        observer, self._observer = self._observer, None
        self._overflow.detach()
        logging.getLogger("watchdog.observers.inotify").addFilter(_is_no_farewell)
        if observer is None:
            return
        if observer.is_alive():
            observer.stop()
            observer.join(5)
        else:
            observer.on_thread_stop()

    def is_alive(self) -> bool:
        """Tell whether every thread that brings events still runs."""
        observer = self._observer
        if observer is None or not observer.is_alive() or not observer.emitters:
            return False
        reader = getattr(observer, "_inotify_fd", None)
        return all(e.is_alive() for e in observer.emitters) and (reader is None or reader.is_alive())

    def request_sign_of_life(self) -> bool:
        """Have an event come, of `path/`, that proves life; return False where none can come any more.

        Raises OSError where the folder can't be opened.
        """
        return all(watches is not None and watches.ask() for watches in self._all_watches())

    def is_partial(self) -> bool:
        """Tell whether some directories are not watched, because a limit is reached."""
        return any(watches is not None and watches.is_partial for watches in self._all_watches())

    def pop_overflow(self) -> bool:
        """Tell whether the kernel's queue has overflowed since last asked."""
        return self._overflow.take()

    def _all_watches(self) -> list[Watches | None]:
        emitters = self._observer.emitters if self._observer is not None else ()
        return [emitter._inotify for emitter in emitters if isinstance(emitter, Emitter)]  # noqa: SLF001


def _is_no_farewell(record: logging.LogRecord) -> bool:
    """Let pass all but what an emitter that is being stopped complains of."""
    return "when the thread is inactive" not in record.getMessage()


class _OverflowFlag(logging.Handler):
    """Hears of queue overflows, which watchdog tells to its loggers alone."""

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

    def take(self) -> bool:
        was_set = self._flag.is_set()
        self._flag.clear()
        return was_set
