"""Events of a drop folder, by watchdog; they only make it quick, the scan makes it correct."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from watchdog.events import (
    DirCreatedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver

from backupd.core.errors import BackupdError
from backupd.drop.folder import DropFolder
from backupd.intake.inotify import Emitter, Ignores, Observer, Watches

_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileCreatedEvent, DirCreatedEvent]

_OVERFLOW_LOGGERS = ("watchdog.observers.inotify_c", "watchdog.observers.inotify")

LIMITS_HINT = "raise fs.inotify.max_user_watches and max_user_instances (sysctl) if a limit is reached"

_THREADS_HINT = "raise the limit of threads (`TasksMax=` of the service, `ulimit -u`)"

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


class Watcher:
    """Watches one drop folder by inotify; an observer of its own, so that no drop can blind another."""

    def __init__(self, folder: DropFolder, notice: Notice, ignores: Ignores, *, recursive: bool) -> None:
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

    def ask(self) -> bool:
        """Have an event come, of `path/`, that proves life; return False where none can come any more.

        Raises OSError where the folder can't be opened.
        """
        return all(watches is not None and watches.ask() for watches in self._all_watches())

    def is_partial(self) -> bool:
        """Tell whether some directories are not watched, because a limit is reached."""
        return any(watches is not None and watches.is_partial for watches in self._all_watches())

    def take_overflow(self) -> bool:
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
