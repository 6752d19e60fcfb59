"""The commands; the only place that prints for people."""

import errno
import io
import os
import sys

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""What a disk says under our output; no fault of ours."""


def main() -> None:
    """Run the command line; what goes wrong is told in words, with the exit code that belongs to it."""
    from backupd.core.errors import BackupdError  # noqa: PLC0415 -- what a command needs is imported by it

    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may hold what the locale can't write
    try:
        from backupd.cli.app import app  # noqa: PLC0415

        app()
    except BackupdError as error:
        sys.stderr.write(_told(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        sys.stderr.write(_told(error))
        sys.exit(1)


def _open_what_is_closed() -> None:
    """Have descriptors 0 to 2 lead nowhere if they are closed: else a file of ours would get our output."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False))


def _told(error: BaseException) -> str:
    """Return an error for a terminal: a file name in it can't forge a line."""
    from backupd.core.names import printable  # noqa: PLC0415

    return "".join(printable(line) + "\n" for line in f"backupd: {error}".split("\n"))
