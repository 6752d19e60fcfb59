"""Events of a drop folder, by watchdog; they only make it quick, the scan makes it correct."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

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
from watchdog.observers.inotify_move_event_grouper import InotifyMoveEventGrouper, PathedInotifyEvent

from backupd.core.errors import BackupdError

_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileCreatedEvent, DirCreatedEvent]
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

# a directory that was moved within the tree keeps its watch, under its new path
warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning, "watchdog")

_OVERFLOW_LOGGERS = ("watchdog.observers.inotify_c", "watchdog.observers.inotify")

LIMITS_HINT = "raise fs.inotify.max_user_watches and max_user_instances (sysctl) if a limit is reached"

Notice = Callable[[bytes, bool], None]
"""Called with an absolute path and whether it is a directory."""


class WatchError(BackupdError):
    """The kernel gives us no events for a folder; the scan has to do alone."""


class _Handler(FileSystemEventHandler):
    """Passes paths on, nothing else: it runs under the observer's lock."""

    def __init__(self, notice: Notice) -> None:
        self._notice = notice

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._notice(os.fsencode(event.src_path), event.is_directory)


Ignores = Callable[[bytes], bool]
"""Called with the absolute path of a directory."""


class _Ungrouped(InotifyMoveEventGrouper):
    """Looks for no other half of a move, of which none comes: it would look through all that waits."""

    def put_event(self, event: PathedInotifyEvent) -> None:
        self._queue.put(event)

    def get_queued_moved_from_event(self, cookie: int) -> PathedInotifyEvent | None:  # noqa: ARG002
        return None


@dataclass
class _Watches(InotifyWatchGroup):
    """The watches on a tree but for what is ignored in it: nothing that lies in `sent` costs anything."""

    ignores: Ignores = lambda _: False
    is_partial: bool = False
    """Whether the kernel had no watch left for some directory."""

    # A directory that was moved keeps its watch. watchdog counts on hearing of that; we need not, as long
    # as there is one path for a watch and one watch for a path.

    def _add_callback(self, path: bytes) -> None:
        is_root = path == self.path
        # the operator wrote the root, which may be a link
        mask = Mask(self.event_mask & ~InotifyConstants.IN_DONT_FOLLOW) if is_root else self.event_mask
        try:
            watch = self._inotify_fd.add_callback(path, mask, self._callback, self._id)
        except OSError as error:
            if is_root:
                raise
            self.is_partial |= error.errno in (errno.ENOSPC, errno.ENOMEM)
            return
        before = self._active_callbacks_by_watch.get(watch)
        if before is not None and self._active_callbacks_by_path.get(before) == watch:
            del self._active_callbacks_by_path[before]
        self._active_callbacks_by_path[path] = watch
        self._active_callbacks_by_watch[watch] = path

    def ask(self, root: int) -> bool:
        """Open the folder under the eyes of its watch; return False where the watch is gone.

        `root` is a descriptor of the folder. The kernel gives the same number for a directory that is watched
        already, and with it what else is to be told of it: for a moment, that somebody opens it.
        """
        queue = self._inotify_fd._inotify_fd  # noqa: SLF001 -- watchdog knows no changed mask
        folder = b"/proc/self/fd/%d" % root
        mask = self.event_mask & ~InotifyConstants.IN_DONT_FOLLOW
        watch = inotify_add_watch(queue, folder, mask | InotifyConstants.IN_OPEN)
        if watch == -1:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        if watch != self._active_callbacks_by_path.get(self.path):
            return False
        try:
            os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        finally:
            inotify_add_watch(queue, folder, mask)
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
        self._add_callback(path)
        if not self.is_recursive:
            return
        waiting = [path]
        while waiting:  # os.walk calls itself for each level, before Python 3.12
            with suppress(OSError), os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False) and not self.ignores(entry.path):
                        self._add_callback(entry.path)
                        waiting.append(entry.path)

    def _recursive_simulate(self, src_path: bytes) -> list[InotifyEvent]:  # noqa: ARG002
        """Make up no events: of a new directory all is looked through, and that is watched by then."""
        return []


class _Emitter(InotifyEmitter):
    ignores: Ignores
    _inotify: _Watches | None

    def on_thread_start(self) -> None:
        self._inotify = _Watches(
            self._inotify_fd,
            os.fsencode(self.watch.path),
            event_mask=self.get_event_mask_from_filter(),
            is_recursive=self.watch.is_recursive,
            ignores=self.ignores,
        )

    def get_event_mask_from_filter(self) -> Mask:
        return _MASK


class _Observer(InotifyObserver):
    def __init__(self, ignores: Ignores) -> None:
        super().__init__()
        self._emitter_class = type("_EmitterHere", (_Emitter,), {"ignores": staticmethod(ignores)})


class Watcher:
    """Watches one drop folder by inotify; an observer of its own, so that no drop can blind another."""

    def __init__(self, path: str, notice: Notice, ignores: Ignores, *, recursive: bool) -> None:
        self._path = path
        self._ignores = ignores
        self._handler = _Handler(notice)
        self._recursive = recursive
        self._observer: BaseObserver | None = None
        self._overflow = _OverflowFlag()

    def start(self) -> None:
        """Begin to watch; raises WatchError where the kernel will not."""
        try:
            self._observer = _Observer(self._ignores)
            self._observer.schedule(
                self._handler, self._path, recursive=self._recursive, event_filter=_EVENTS
            )
            self._observer.start()
        except OSError as error:
            self.stop()
            raise WatchError(
                f"{self._path}: no events ({error.strerror or error})",
                LIMITS_HINT,
            ) from error
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

    def ask(self, root: int) -> bool:
        """Have an event come, of `path/`, that proves life; return False where none can come any more.

        `root` is a descriptor of the folder. Raises OSError where that can't be opened.
        """
        return all(watches is not None and watches.ask(root) for watches in self._all_watches())

    def is_partial(self) -> bool:
        """Tell whether some directories are not watched, because a limit is reached."""
        return any(watches is not None and watches.is_partial for watches in self._all_watches())

    def take_overflow(self) -> bool:
        """Tell whether the kernel's queue has overflowed since last asked."""
        return self._overflow.take()

    def _all_watches(self) -> list[_Watches | None]:
        emitters = self._observer.emitters if self._observer is not None else ()
        return [emitter._inotify for emitter in emitters if isinstance(emitter, _Emitter)]  # noqa: SLF001


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
