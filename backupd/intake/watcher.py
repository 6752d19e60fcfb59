"""The events of a drop folder, by inotify.

Events make the intake fast; the scan makes sure that no file is missed.
"""

from __future__ import annotations

import errno
import os
from contextlib import closing, suppress
from dataclasses import dataclass

from inotify_simple import INotify, flags
from watchdog.events import DirCreatedEvent, FileModifiedEvent, FileSystemEvent
from watchdog.observers.api import EventEmitter, EventQueue, ObservedWatch

from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DirectoryCache

_MASK = flags.CLOSE_WRITE | flags.CREATE | flags.MOVED_TO | flags.MOVE_SELF | flags.ATTRIB
"""Events of files that arrive, of directories that may be readable now, and the move of one that is watched.

The daemon must not be woken by its own reads and moves. The kernel reports an overflow and the removal of a
watch, of a deleted or unmounted directory for example, without a bit in the mask.
"""


@dataclass(frozen=True, slots=True)
class WatchFault:
    """Why events were lost, as it is logged."""

    reason: str
    error: str
    hint: str = "no action needed: the rescan finds the files of lost events, and the watcher is restarted"


class WatchEndedEvent(FileSystemEvent):
    """The watcher has ended by itself: a scan is due, and then a new watcher."""

    event_type = "watch_ended"


class Watcher(EventEmitter):
    """Queues the events of one drop folder, in a thread of its own.

    The items of the queue are pairs of an event and the watch. The path of an event is in bytes and relative
    to the drop folder. After a `DirCreatedEvent` the directory has to be scanned: files may have arrived
    before it was watched.

    Directories are opened below the drop folder's descriptor and watched through that descriptor, so that a
    directory that is replaced by a link cannot make the daemon watch a directory outside. The drop's own
    folders and hidden ones are not watched: the size of `sent/` costs nothing.
    """

    def __init__(self, drop: Drop, queue: EventQueue) -> None:
        """Open an inotify instance; raise OSError if the kernel refuses. `close` closes it."""
        super().__init__(queue, ObservedWatch(drop.folder.path, recursive=drop.config.recursive))
        self.name = f"watcher of {drop.name}"
        self._folder = drop.folder
        self._skips = drop.skips
        self._inotify = INotify()
        self._root = -1
        self._paths: dict[int, bytes] = {}
        """The directory of each watch descriptor. A directory that is moved keeps its descriptor."""
        self.refused: dict[bytes, int | None] = {}
        """Directories that could not be watched, nor those below them, with their `errno`."""
        self.fault = WatchFault("dead", "the thread of the watcher has ended")
        """Why the watcher does not work, once it does not."""

    # overrides EventEmitter
    def on_thread_start(self) -> None:
        """Watch the drop folder; raise OSError if the kernel refuses."""
        self._watch_tree(b"")
        self._root = next(iter(self._paths))

    # overrides EventEmitter
    def on_thread_stop(self) -> None:
        """Wake the thread: the removal of a watch is an event."""
        with suppress(OSError):  # the kernel has removed the watch, and its event ends the thread
            self._inotify.rm_watch(self._root)

    def close(self) -> None:
        """Stop watching and wait for the thread."""
        self.stop()
        if self.is_alive():
            self.join()
        self._inotify.close()

    def is_working(self) -> bool:
        """Return whether the thread runs and will go on to queue events."""
        return self.is_alive() and self.should_keep_running()

    def is_limited(self) -> bool:
        """Return whether some directories are not watched because a limit of the kernel is reached."""
        return not {errno.ENOSPC, errno.ENOMEM}.isdisjoint(self.refused.values())

    def retry(self) -> None:
        """Watch the directories that were refused, as far as that is possible now; a scan has to follow."""
        for relpath in list(self.refused):
            del self.refused[relpath]
            self._watch_tree(relpath)

    # overrides EventEmitter
    def queue_events(self, timeout: float) -> None:  # noqa: ARG002 -- `on_thread_stop` ends the wait
        """Wait for events, and queue those that have arrived."""
        for wd, mask, _, name in self._inotify.read():
            directory = self._paths.get(wd)
            if mask & flags.Q_OVERFLOW:
                hint = "raise fs.inotify.max_queued_events (sysctl)"
                self._end(WatchFault("overflow", "the event queue of the kernel overflowed", hint))
            elif wd == self._root and mask & (flags.IGNORED | flags.MOVE_SELF):
                self._end(WatchFault("removed", "the folder was moved, or the kernel no longer watches it"))
            elif mask & flags.IGNORED:
                self._paths.pop(wd, None)
            elif name and directory is not None:
                relpath = os.path.join(directory, os.fsencode(name))
                if not mask & flags.ATTRIB or self.refused.pop(relpath, None) is not None:
                    self._queue_path(relpath, bool(mask & flags.ISDIR))

    def _queue_path(self, relpath: bytes, is_directory: bool) -> None:
        if not is_directory:
            self.queue_event(FileModifiedEvent(relpath))
        elif self.watch.is_recursive and not self._skips(relpath):
            self._watch_tree(relpath)
            self.queue_event(DirCreatedEvent(relpath))

    def _end(self, fault: WatchFault) -> None:
        """End the thread: only a new watcher and a scan make up for the lost events."""
        if self.should_keep_running():
            self.fault = fault
            self.stop()
            self.queue_event(WatchEndedEvent(b""))

    def _watch_tree(self, top: bytes) -> None:
        """Watch a directory, list it, and watch those below; later ones are events."""
        pending = [top]
        with closing(DirectoryCache(self._folder)) as directories:
            while pending and self.should_keep_running():
                relpath = pending.pop()
                try:
                    directory = directories.directory(relpath)
                    wd = self._inotify.add_watch(f"/proc/self/fd/{directory}", _MASK)
                    self._paths[wd] = relpath
                    if self.watch.is_recursive:
                        pending += self._subdirectories(relpath, directory)
                except OSError as error:
                    if not relpath:
                        raise
                    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # removed or replaced
                        self.refused[relpath] = error.errno

    def _subdirectories(self, relpath: bytes, directory: int) -> list[bytes]:
        with os.scandir(directory) as entries:
            names = [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        paths = (os.path.join(relpath, name) for name in names)
        return [path for path in paths if not self._skips(path)]
