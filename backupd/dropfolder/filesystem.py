"""Whether somebody still has a file open for writing."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_NETWORK = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "orangefs",
        "prl_fs",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "vmhgfs",
    ]
)


def filesystem_of(path: str, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Return the type of the filesystem that holds a path, such as `ext4`; proc_pid_mountinfo(5)."""
    wanted = os.path.realpath(path)
    best, kind = "", "unknown"
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            point = _unescape(left.split(" ")[4])
            inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):  # of mounts over one another the last one counts
                best, kind = point, right.split(" ")[0]
    return kind


def is_remote(filesystem: str) -> bool:
    """Tell whether others can write to a filesystem without this kernel noticing."""
    return filesystem in _NETWORK or filesystem.split(".", maxsplit=1)[0] in ("fuse", "fuseblk")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


class BeingWrittenError(OSError):
    """Somebody has a file open for writing."""


def is_being_written(fd: int) -> bool:
    """Tell whether a file, open here for reading only, is open for writing elsewhere on this host.

    A hint: the kernel answers only to the file's owner or with CAP_LEASE, and only for local filesystems;
    in doubt it is False. The lease is given back at once; a writer that comes in between waits for no
    more than that, and the SIGIO that it makes the kernel send us has to be ignored by the process.
    fcntl(2), "Leases".
    """
    try:
        with read_lease(fd):
            return False
    except BeingWrittenError:
        return True


@contextmanager
def read_lease(fd: int) -> Iterator[Callable[[], bool]]:
    """Have whoever would open a file for writing wait for the end of the block, as far as the kernel helps.

    Yields what tells whether somebody waits. Raises BeingWrittenError where somebody has it open already.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        is_leased = True
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise BeingWrittenError(errno.ETXTBSY, "somebody has it open for writing") from error
        is_leased = False
    try:
        yield lambda: is_leased and fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
    finally:
        if is_leased:
            with suppress(OSError):  # the kernel takes it back from whoever keeps a writer waiting for long
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
