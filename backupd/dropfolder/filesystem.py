"""Properties of a file's filesystem and of its open descriptors that the kernel reports."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from backupd.core.filesystems import is_remote
from backupd.core.mountinfo import MountEntry, filesystem_at, mounts_within, parse_mountinfo


def filesystem_of(path: str, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Return the type of the filesystem that holds a path, such as `ext4`; links in the path are followed.

    `unknown` if no mount point contains it. Raises OSError if the mount table can't be read.
    """
    return filesystem_at(os.fsencode(os.path.realpath(path)), _mounts(mountinfo))


def mounts_of(path: str, mountinfo: str = "/proc/self/mountinfo") -> list[MountEntry]:
    """Return the mount that holds a folder, and those below it; links in the path are followed.

    Raises OSError if the mount table can't be read.
    """
    return mounts_within(os.fsencode(os.path.realpath(path)), _mounts(mountinfo))


def _mounts(mountinfo: str) -> list[MountEntry]:
    with open(mountinfo, "rb") as file:
        return parse_mountinfo(file.read())


_CAP_LEASE = 1 << 28
"""The bit of this capability in a mask; source: capability.h of Linux."""


def blind_spot(directory: int, filesystem: str) -> str:
    """Return why files in a directory that are still open for writing can't be detected; empty if they can.

    `filesystem` is the type of the directory's filesystem. A file without a name is created there to find
    out; where that is impossible, leases are tried only when they are needed.
    """
    if is_remote(filesystem):
        return f"writers on other hosts are invisible on {filesystem}"
    if not _has_cap_lease():
        return "without CAP_LEASE, only files of the daemon's own user show their writers"
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError:
        return ""
    try:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return "" if is_being_written(reader) else f"{filesystem} has no leases on files"
        finally:
            os.close(reader)
    except OSError:
        return ""
    finally:
        os.close(fd)


def _has_cap_lease(status: str = "/proc/self/status") -> bool:
    with open(status) as file:
        effective = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) & _CAP_LEASE)


class BeingWrittenError(OSError):
    """Another process has the file open for writing."""


def is_being_written(fd: int) -> bool:
    """Return whether a file, open here for reading only, is open for writing elsewhere on this host.

    A hint only: the kernel answers to the file's owner or with CAP_LEASE, and for local filesystems; without
    an answer the result is False.
    """
    try:
        with read_lease(fd):
            return False
    except BeingWrittenError:
        return True


@contextmanager
def read_lease(fd: int) -> Iterator[Callable[[], bool]]:
    """Hold a read lease on a file during the block, where the kernel grants one.

    Another process that opens the file for writing waits until the block ends. The kernel then sends SIGIO
    to this process, which must ignore it. Yields a function that returns whether a writer is waiting.
    Raises BeingWrittenError if the file is open for writing already. Where the kernel refuses a lease, the
    block runs without one. Source: fcntl(2), "Leases".
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        is_leased = True
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise BeingWrittenError(errno.ETXTBSY, "another process has it open for writing") from error
        is_leased = False
    try:
        yield lambda: is_leased and fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
    finally:
        if is_leased:
            with suppress(OSError):  # the kernel revokes a lease that blocks a writer for too long
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
