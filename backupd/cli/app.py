"""The `backupd` program: its commands, and the exit codes of errors."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import Annotated, Any

import typer

import backupd.upload.registry  # noqa: F401 -- registers the kinds of destinations for every command
from backupd import __version__
from backupd.cli.options import Command, CommandGroup
from backupd.core.errors import BackupdError
from backupd.core.names import printable

_HOST_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of the disk that standard output is redirected to, and of the host's limits; they are no bugs."""

_LIMITS = "`MemoryMax=`, `TasksMax=` or `LimitAS=`"

_NO_MEMORY = f"backupd: no memory is left: raise {_LIMITS} of the unit\n".encode()
_NO_THREAD = f"backupd: can't start new thread: raise {_LIMITS} of the unit\n".encode()
"""Made early: at the limit, no memory may be left for them."""

_HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}

_COMMANDS = {
    "run": "run:run",
    "check": "check:check",
    "push": "push:push",
    "status": "status:status",
    "list": "list:list_deliveries",
    "show": "show:show",
    "audit": "audit:audit",
    "report": "report:report",
    "retry": "retry:retry",
    "pause": "pause:pause",
    "resume": "pause:resume",
    "forget": "forget:forget",
    "notify": "notify:notify",
    "init": "init:init",
    "config": "config:app",
    "install": "install:install",
    "uninstall": "install:uninstall",
    "receive": "receive:receive",
    "demo": "demo:demo",
}
"""The module in this package and the function, or the group, of each command, in the order of the help."""


class _Commands(CommandGroup):
    """The group of all commands, which imports the module of a command when it is used.

    A command starts in half of the time without the modules of all others.
    """

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 -- the signature is of the base class
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(f"backupd.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            group = typer.main.get_command(command)
            group.name = cmd_name
            return group
        single = typer.Typer(
            add_completion=False, rich_markup_mode="markdown", context_settings=_HELP_OPTIONS
        )
        single.command(cmd_name, cls=Command)(command)
        return typer.main.get_command(single)


app = typer.Typer(
    name="backupd",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings=_HELP_OPTIONS,
    help="Deliver configuration backups from drop folders to HTTPS endpoints, and verify each delivery.\n\n"
    "First steps: `backupd demo` delivers two sample archives, `backupd init` prints a configuration, "
    "`backupd check` tests it, and `backupd run` starts the daemon.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 something was rejected, 69 a destination or the ledger is "
    "unavailable, 75 still pending, 78 configuration.",
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
        if error.errno not in _HOST_ERRORS:
            raise
        sys.stderr.write(_format_error(error))
        sys.exit(1)
    except (MemoryError, RuntimeError, SystemError, ImportError) as error:
        if not _is_host_limit(error):
            raise
        is_thread_limit = isinstance(error, RuntimeError)
        error.__traceback__ = None  # its frames hold memory
        os.write(2, _NO_THREAD if is_thread_limit else _NO_MEMORY)
        sys.exit(1)


def _is_host_limit(error: Exception) -> bool:
    """Return whether the memory or the number of threads that the host permits is used up."""
    if isinstance(error, SystemError):  # a module of C that could not be loaded for want of memory
        return isinstance(error.__cause__ or error.__context__, MemoryError)
    if isinstance(error, ImportError):
        return "failed to map segment" in str(error) or "cannot allocate memory" in str(error).lower()
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)


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
