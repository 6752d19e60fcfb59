"""Opening, listing and removing files in a drop folder.

Paths are bytes, relative to the folder. Every directory on the way is opened with O_NOFOLLOW, so that a user
who may write to the folder can't redirect the daemon by replacing a directory with a symbolic link.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shlex
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

PATH_MAX = 4096
"""Bytes in a path, as in limits.h; a longer path below a drop folder is refused."""

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DOTS = frozenset((b".", b".."))

_LOCK_TIMEOUT, _LOCK_RETRY_PAUSE = 1.0, 0.1
"""Seconds for which a lock is tried: `backupd check` has it for a moment."""

_OPEN_EVERY = 5.0
"""Seconds between two attempts of a folder to open itself."""

_MOUNT_GRACE = 24 * 3600.0
"""Seconds for which a file that is missing in another directory than before may be in one not mounted."""

OnUnreadable = Callable[[bytes, OSError], None]
"""Called with the relative path of a file or directory that can't be read, and the error."""


class FolderInUseError(OSError):
    """Another program has locked the drop folder; `hint` is what to do."""

    def __init__(self, path: str, holder: int) -> None:
        process = f" (process {holder})" if holder else ""
        super().__init__(errno.EBUSY, f"another backupd, or another program, has locked the folder{process}")
        command = f"`ps -fp {holder}`" if holder else f"`fuser -v {shlex.quote(path)}`"
        self.hint = (
            f"{command} shows the program; give each backupd folders of its own, or stop one of the two"
        )


class DropFolder:
    """A drop folder, held open by a descriptor; safe to use from several threads.

    The methods raise OSError as the system calls do; all but `reopen`, `close` and `is_in_place` raise it
    (ENOTCONN) if the folder could not be opened yet.
    """

    def __init__(
        self, path: str, *, is_open: bool = True, opens_itself: bool = False, is_exclusive: bool = False
    ) -> None:
        """Open the folder, unless `is_open` is False: `reopen` opens it then.

        With `opens_itself`, `is_ready` opens it in a thread, for a folder that no intake takes care of. With
        `is_exclusive`, only one process has the folder open so, see `reopen`.
        """
        self.path = path
        self.is_usable = False
        """Whether the folder could be read when it was last checked; nothing else accesses it while not."""
        self._fd = -1
        self.opened_at = 0.0
        """When the directory that is held open was opened first (monotonic)."""
        self._opens_itself = opens_itself
        self._opener: threading.Thread | None = None
        self._next_try = 0.0
        """When the folder may be opened by another thread (monotonic)."""
        self._is_exclusive = is_exclusive
        self.imitates_owner = False
        """Whether new directories get the owner, the group and the mode of the one in which they are."""
        if is_open:
            self.reopen()
            self.is_usable = True

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            close_descriptor(self._fd)

    def fileno(self) -> int:
        """Return the descriptor."""
        if self._fd < 0:
            raise OSError(errno.ENOTCONN, "the drop folder could not be opened yet")
        return self._fd

    def is_ready(self) -> bool:
        """Return `is_usable`; while it is False, a folder that opens itself tries to every few seconds."""
        if self.is_usable or not self._opens_itself:
            return self.is_usable
        if time.monotonic() >= self._next_try and (self._opener is None or not self._opener.is_alive()):
            self._next_try = time.monotonic() + _OPEN_EVERY
            self._opener = threading.Thread(target=self._open, name=f"open {self.path}", daemon=True)
            self._opener.start()
        return False

    def _open(self) -> None:
        with suppress(OSError):
            self.reopen()
            self.is_usable = True

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the directory that is held open."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fileno()))
        except OSError:
            return False

    def check_readable(self) -> None:
        """Raise OSError if the daemon may no longer list the directory that is held open."""
        _is_empty(self.fileno())

    def reopen(self) -> None:
        """Open the directory that the path leads to now, under the same descriptor number.

        An exclusive folder is locked with flock, where its filesystem can lock directories (NFS cannot).
        Raises FolderInUseError if another program has it locked.
        """
        # the root may be a symbolic link, as the operator wrote it
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._is_held(fd):
                self._lock(self._fd)  # the lock of another descriptor would be refused
                return
            self._lock(fd)
            self.opened_at = time.monotonic()  # before another thread can use the directory
            if self._fd < 0:
                self._fd, fd = fd, -1
            else:
                os.dup2(fd, self._fd, inheritable=False)
        finally:
            if fd >= 0:
                close_descriptor(fd)

    def unlock(self) -> None:
        """Release the lock of an exclusive folder, until it is opened again."""
        with suppress(OSError):
            fcntl.flock(self.fileno(), fcntl.LOCK_UN)

    def lock_holder(self) -> int | None:
        """Return the process that has locked the folder, 0 if that is unknown, None if none has."""
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _lock_holder(self.fileno())
        except OSError:
            return None  # its filesystem can't lock directories
        self.unlock()
        return None

    def _is_held(self, fd: int) -> bool:
        """Return whether the directory of a descriptor is the one that is held open."""
        with suppress(OSError):
            return self._fd >= 0 and os.path.samestat(os.fstat(fd), os.fstat(self._fd))
        return False

    def _lock(self, fd: int) -> None:
        if not self._is_exclusive:
            return
        until = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise FolderInUseError(self.path, _lock_holder(fd)) from None
                time.sleep(_LOCK_RETRY_PAUSE)
            except OSError:
                return  # its filesystem can't lock directories
            else:
                return

    def id(self) -> int:
        """Return a number of the directory that is held open, made of its inode and its filesystem.

        Most local filesystems have a number that no boot changes; the others get that of their device.
        """
        fd = self.fileno()
        filesystem, inode = os.fstatvfs(fd).f_fsid or os.fstat(fd).st_dev, os.fstat(fd).st_ino
        digest = hashlib.blake2b(b"%d %d" % (filesystem, inode), digest_size=8).digest()
        return int.from_bytes(digest, signed=True)

    def is_unmounted(self, folder_id: int) -> bool:
        """Return whether a file that is missing may be in another directory, which is not mounted here now.

        `folder_id` is the number that this folder had when it held the file, 0 if unknown; earlier versions
        stored its inode. The result is True if the folder's path leads to another directory than the one that
        is held open, or if this one has another number and has been open for less than a day, or is empty.
        """
        if not self.is_in_place():
            return True
        if folder_id in (self.id(), os.fstat(self.fileno()).st_ino):
            return False
        is_new = folder_id != 0 and time.monotonic() - self.opened_at < _MOUNT_GRACE
        return is_new or _is_empty(self.fileno())

    @contextmanager
    def directory(self, relpath: bytes, *, create: bool = False) -> Iterator[int]:
        """Open a directory below the folder and yield its descriptor; `b""` is the folder itself.

        With `create`, missing directories on the way are created.
        """
        root = fd = self.fileno()
        try:
            for name in _components(relpath):
                is_new = create and _make_directory(name, fd)
                child = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
                if is_new and self.imitates_owner:
                    _imitate(child, os.fstat(fd))
                if fd != root:
                    close_descriptor(fd)
                fd = child
            yield fd
        finally:
            if fd != root:
                close_descriptor(fd)

    def stat(self, relpath: bytes) -> os.stat_result:
        """Return the status of a file; of a symbolic link, the status of the link."""
        parent, _, name = relpath.rpartition(b"/")
        with self.directory(parent) as fd:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def may_exist(self, relpath: bytes) -> bool:
        """Return whether there is a file at a path, or it can't be determined."""
        try:
            self.stat(relpath)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # the caller's next access reports the error
        return True

    def open(self, relpath: bytes) -> int:
        """Open a regular file for reading and return its descriptor, which the caller closes.

        Raises OSError (EINVAL) for any other kind of file; never blocks on a FIFO.
        """
        parent, _, name = relpath.rpartition(b"/")
        with self.directory(parent) as directory:
            fd = os.open(name, _OPEN_FILE, dir_fd=directory)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
        except OSError:
            close_descriptor(fd)
            raise
        return fd

    def read(self, relpath: bytes, max_bytes: int) -> bytes:
        """Return up to `max_bytes` bytes from the beginning of a regular file."""
        fd = self.open(relpath)
        try:
            return os.pread(fd, max_bytes, 0)
        finally:
            close_descriptor(fd)

    def unlink(self, relpath: bytes) -> None:
        """Remove a file."""
        parent, _, name = relpath.rpartition(b"/")
        with self.directory(parent) as fd:
            os.unlink(name, dir_fd=fd)

    def sync(self, relpath: bytes) -> None:
        """Write the entries of a directory to disk with fsync."""
        with self.directory(relpath) as fd:
            os.fsync(fd)


class CachedFolder(DropFolder):
    """A drop folder that keeps its subdirectories open, for one thread.

    A directory may be in use while another is opened, so directories are closed only by `close`, which does
    not close the drop folder itself.
    """

    def __init__(self, folder: DropFolder) -> None:
        self.path = folder.path
        self._fd = folder.fileno()
        self.opened_at = folder.opened_at
        self.imitates_owner = folder.imitates_owner
        self._directories: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Return the number of open directories."""
        return len(self._directories)

    def close(self) -> None:
        """Close all directories, none of which may be in use; they are opened again when needed."""
        while self._directories:
            close_descriptor(self._directories.popitem()[1])

    @contextmanager
    def directory(self, relpath: bytes, *, create: bool = False) -> Iterator[int]:
        """See `DropFolder.directory`."""
        if relpath not in self._directories:
            with super().directory(relpath, create=create) as fd:
                self._directories[relpath] = os.dup(fd)
        yield self._directories[relpath]


class DirectoryCache:
    """Opens the directories of a folder one after the other, for one thread.

    The last directory stays open and its children are opened from there, so that descending costs one system
    call for each level.
    """

    def __init__(self, folder: DropFolder) -> None:
        self._folder = folder
        self._last: tuple[bytes, int] | None = None

    def directory(self, relpath: bytes) -> int:
        """Return a descriptor of a directory, valid until the next call.

        It has its own read position, so that other threads may list the directory at the same time.
        """
        if len(relpath) >= PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        parent, _, name = relpath.rpartition(b"/")
        if self._last and name and self._last[0] == parent and name not in _DOTS:
            fd = os.open(name, _OPEN_DIRECTORY, dir_fd=self._last[1])
            self.close()
        else:
            self.close()
            with self._folder.directory(relpath) as directory:
                fd = os.open(b".", _OPEN_DIRECTORY, dir_fd=directory)
        self._last = relpath, fd
        return fd

    def close(self) -> None:
        """Close the last directory."""
        last, self._last = self._last, None
        if last:
            close_descriptor(last[1])


def close_descriptor(fd: int) -> None:
    """Close a descriptor of a file that was only read, or of a directory.

    An error at this point, as on a network filesystem that is gone, concerns none of what was read.
    """
    with suppress(OSError):
        os.close(fd)


def walk(
    folder: DropFolder,
    top: bytes,
    skips: Callable[[bytes], bool],
    on_unreadable: OnUnreadable,
    should_continue: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield the relative path and status of every file below the directory `top` of the folder.

    A directory for which `skips` returns True is not entered, but yielded as a file is. Files and directories
    that can't be read go to `on_unreadable`, except those that have disappeared meanwhile.
    It ends once `should_continue`, called before each directory, returns False.
    """
    pending = [top]
    with closing(DirectoryCache(folder)) as directories:
        while pending and should_continue():
            directory = pending.pop()
            try:
                with os.scandir(directories.directory(directory)) as entries:
                    for entry in entries:
                        name = os.fsencode(entry.name)
                        relpath = directory + b"/" + name if directory else name
                        if entry.is_dir(follow_symlinks=False) and not skips(relpath):
                            pending.append(relpath)
                            continue
                        try:
                            yield relpath, entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        except OSError as error:
                            on_unreadable(relpath, error)
            except (FileNotFoundError, NotADirectoryError) as error:
                if not directory:
                    on_unreadable(directory, error)
            except OSError as error:
                on_unreadable(directory, error)


def _make_directory(name: bytes, parent: int) -> bool:
    """Create a directory; return False if it exists."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o770, dir_fd=parent)
        return True
    return False


def _imitate(directory: int, other: os.stat_result) -> None:
    """Give a directory that this process has created the owner, the group and the mode of another one."""
    if os.fstat(directory).st_uid == os.geteuid():  # nobody has replaced it
        os.fchown(directory, other.st_uid, other.st_gid)
        os.fchmod(directory, stat.S_IMODE(other.st_mode))


def _lock_holder(fd: int) -> int:
    """Return the process that has locked a directory, 0 if unknown. Source: proc_locks(5)."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as file:
        for line in file:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == place:
                return max(int(fields[4]), 0)
    return 0


def _is_empty(directory: int) -> bool:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        with os.scandir(fd) as entries:
            return next(entries, None) is None
    finally:
        close_descriptor(fd)


def _components(relpath: bytes) -> list[bytes]:
    names = [name for name in relpath.split(b"/") if name]
    if not _DOTS.isdisjoint(names):
        raise OSError(errno.EINVAL, "a path below a drop folder must not contain . or ..")
    return names
