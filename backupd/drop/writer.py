"""Whether somebody still has a file open for writing."""

from __future__ import annotations

import errno
import fcntl


def is_being_written(fd: int) -> bool:
    """Tell whether a file, open here for reading only, is open for writing elsewhere on this host.

    A hint: the kernel answers only to the file's owner or with CAP_LEASE, and only for local filesystems;
    in doubt it is False. The lease is given back at once; a writer that comes in between waits for no
    more than that, and the SIGIO that it makes the kernel send us has to be ignored by the process.
    fcntl(2), "Leases".
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
