"""Looking into a drop folder, and opening, moving and removing what is there.

Paths are bytes relative to the folder. Every directory on the way is opened with O_NOFOLLOW, so that
nobody who may write there can lead us elsewhere by swapping a directory for a link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST = 4096
"""Bytes of a path, PATH_MAX: to open a file there each step on the way is opened."""

_DOTS = frozenset((b".", b".."))
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class DropFolder:
    """A drop folder, held by a descriptor; safe to use from several threads.

    Methods raise OSError as the system calls do.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # the root may itself be a link: the operator wrote it
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def is_in_place(self) -> bool:
        """Tell whether the path still leads to the directory that we hold."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._fd))

    def check_readable(self) -> None:
        """Raise OSError where we have no right any more to what our descriptor still leads to."""
        _is_empty(self._fd)

    def reopen(self) -> None:
        """Hold the directory that the path leads to now, under the same descriptor number."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.dup2(fd, self._fd, inheritable=False)
        finally:
            os.close(fd)

    def is_unreachable(self, relpath: bytes, device: int) -> bool:
        """Tell whether a file that is not found may only lie on a filesystem that is not mounted now.

        So it is while our path leads elsewhere, and where the last directory on the way to it is empty and on
        another device than the file was: an empty place to mount on. The number alone would not do, as it
        may change.
        """
        if not self.is_in_place():
            return True
        while relpath:
            relpath = relpath.rpartition(b"/")[0]
            with suppress(OSError), self.directory(relpath) as fd:
                return os.fstat(fd).st_dev != device and _is_empty(fd)
        return False

    @contextmanager
    def directory(self, relpath: bytes, *, create: bool = False) -> Iterator[int]:
        """Open a directory below the folder, `b""` for the folder itself; made first if `create`."""
        fd = self._fd
        try:
            for part in _parts(relpath):
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o770, dir_fd=fd)
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                if fd != self._fd:
                    os.close(fd)
                fd = below
            yield fd
        finally:
            if fd != self._fd:
                os.close(fd)

    def stat(self, relpath: bytes) -> os.stat_result:
        """Return the status of what is there, a link's own."""
        parent, _, name = relpath.rpartition(b"/")
        with self.directory(parent) as fd:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def open(self, relpath: bytes) -> int:
        """Open a regular file for reading; the caller closes the descriptor.

        Raises OSError (EINVAL) for anything else, without having waited for it.
        """
        parent, _, name = relpath.rpartition(b"/")
        with self.directory(parent) as directory:
            fd = os.open(name, _FILE, dir_fd=directory)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
        except OSError:
            os.close(fd)
            raise
        return fd

    def read(self, relpath: bytes, most: int) -> bytes:
        """Return up to `most` bytes from the beginning of a regular file."""
        fd = self.open(relpath)
        try:
            return os.pread(fd, most, 0)
        finally:
            os.close(fd)

    def unlink(self, relpath: bytes) -> None:
        """Remove a file."""
        parent, _, name = relpath.rpartition(b"/")
        with self.directory(parent) as fd:
            os.unlink(name, dir_fd=fd)

    def sync(self, relpath: bytes) -> None:
        """Make the entries of a directory durable."""
        with self.directory(relpath) as fd:
            os.fsync(fd)


class DirectoryCache:
    """Opens the directories of a folder one after the other, for one thread.

    The last one stays open: what lies in it is opened from there, so that a path costs its last step.
    """

    def __init__(self, folder: DropFolder) -> None:
        self._folder = folder
        self._last: tuple[bytes, int] | None = None

    def directory(self, relpath: bytes) -> int:
        """Return a descriptor of a directory, which is good until the next is asked for.

        It has a position of its own, so that others may list the directory at the same time.
        """
        if len(relpath) >= _LONGEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        parent, _, name = relpath.rpartition(b"/")
        if self._last and name and self._last[0] == parent and name not in _DOTS:
            fd = os.open(name, _DIRECTORY, dir_fd=self._last[1])
            self.close()
        else:
            self.close()
            with self._folder.directory(relpath) as there:
                fd = os.open(b".", _DIRECTORY, dir_fd=there)
        self._last = relpath, fd
        return fd

    def close(self) -> None:
        """Let go of the last one."""
        last, self._last = self._last, None
        if last:
            os.close(last[1])


def _is_empty(directory: int) -> bool:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        with os.scandir(fd) as entries:
            return next(entries, None) is None
    finally:
        os.close(fd)


def _parts(relpath: bytes) -> list[bytes]:
    parts = [part for part in relpath.split(b"/") if part]
    if not _DOTS.isdisjoint(parts):
        raise OSError(errno.EINVAL, "a path with dots does not stay in its folder")
    return parts


class CachedFolder(DropFolder):
    """For one thread; `close` lets go of the directories, never of the drop folder itself.

    It closes nothing by itself: a directory may be in use while another is opened.
    """

    def __init__(self, folder: DropFolder) -> None:
        self.path = folder.path
        self._fd = folder.fileno()
        self._held: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Return how many directories are open."""
        return len(self._held)

    def close(self) -> None:
        """Let go of all directories, none of which may be in use; they are opened anew when needed."""
        while self._held:
            os.close(self._held.popitem()[1])

    @contextmanager
    def directory(self, relpath: bytes, *, create: bool = False) -> Iterator[int]:
        """See `DropFolder.directory`."""
        if relpath not in self._held:
            with super().directory(relpath, create=create) as fd:
                self._held[relpath] = os.dup(fd)
        yield self._held[relpath]


OnUnreadable = Callable[[bytes, OSError], None]


def walk(
    folder: DropFolder,
    below: bytes,
    skip: frozenset[bytes],
    complain: OnUnreadable,
    *,
    recursive: bool,
    go_on: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield the relative path and status of all that is no directory, below a directory of the folder.

    `skip` names directories that are not entered, relative to the folder. What can't be read goes to
    `complain`, except what has vanished meanwhile; the rest of the walk goes on. `go_on` is asked before
    each directory.
    """
    waiting = [below]
    with closing(DirectoryCache(folder)) as descent:
        while waiting and go_on():
            directory = waiting.pop()
            try:
                with os.scandir(descent.directory(directory)) as entries:
                    for entry in entries:
                        name = os.fsencode(entry.name)
                        relpath = directory + b"/" + name if directory else name
                        if entry.is_dir(follow_symlinks=False):
                            if recursive and relpath not in skip and not name.startswith(b"."):
                                waiting.append(relpath)
                            continue
                        try:
                            yield relpath, entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        except OSError as error:
                            complain(relpath, error)
            except (FileNotFoundError, NotADirectoryError) as error:
                if not directory:
                    complain(directory, error)
            except OSError as error:
                complain(directory, error)
