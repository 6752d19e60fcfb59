"""The `backupd` program: its commands, and the exit codes of errors."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated

import typer

from backupd import __version__
from backupd.cli import (
    audit,
    check,
    config,
    demo,
    forget,
    init,
    install,
    push,
    receive,
    retry,
    run,
    show,
    status,
)
from backupd.cli import list as listing
from backupd.core.errors import BackupdError
from backupd.core.names import printable

_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""Errors of the disk that standard output is redirected to; they are no bugs of backupd."""

app = typer.Typer(
    name="backupd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Deliver configuration backups from drop folders to HTTPS endpoints, and verify each delivery.\n\n"
    "First steps: `backupd demo` delivers two sample archives, `backupd init` prints a configuration, "
    "`backupd check` tests it, and `backupd run` starts the daemon.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 something was rejected, 69 a destination is unavailable, "
    "75 still pending, 78 configuration.",
)


def main() -> None:
    """Run the command line; print an error as text and exit with its exit code."""
    _open_closed_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a file name may have characters that the locale's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BackupdError as error:
        sys.stderr.write(_format_error(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            raise
        sys.stderr.write(_format_error(error))
        sys.exit(1)


def _open_closed_descriptors() -> None:
    """Open /dev/null in place of closed descriptors 0 to 2, or the next file to be opened gets the output."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False))


def _format_error(error: BaseException) -> str:
    """Return the lines for an error, in which control characters of file names are escaped."""
    return "".join(printable(line) + "\n" for line in f"backupd: {error}".split("\n"))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"backupd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return


app.command("run")(run.run)
app.command("check")(check.check)
app.command("push")(push.push)
app.command("status")(status.status)
app.command("list")(listing.list_deliveries)
app.command("show")(show.show)
app.command("audit")(audit.audit)
app.command("retry")(retry.retry)
app.command("forget")(forget.forget)
app.command("init")(init.init)
app.add_typer(config.app, name="config")
app.command("install")(install.install)
app.command("uninstall")(install.uninstall)
app.command("receive")(receive.receive)
app.command("demo")(demo.demo)
