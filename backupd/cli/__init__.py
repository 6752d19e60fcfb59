"""The commands; the only place that prints for people."""

import errno
import io
import sys

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""What a disk says under our output; no fault of ours."""


def main() -> None:
    """Run the command line; what goes wrong is told in words, with the exit code that belongs to it."""
    from backupd.core.errors import BackupdError  # noqa: PLC0415 -- what a command needs is imported by it

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


def _told(error: BaseException) -> str:
    """Return an error for a terminal: a file name in it can't forge a line."""
    from backupd.core.names import printable  # noqa: PLC0415

    return "".join(printable(line) + "\n" for line in f"backupd: {error}".split("\n"))
