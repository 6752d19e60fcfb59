"""Runs a command without a shell: with its input in memory, a time limit, and a bounded output."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

MAX_OUTPUT = 65536
"""Bytes of output that are kept by default; the rest is read and dropped."""

_CHUNK = 65536
"""Bytes that are read at once: what a pipe holds."""

_POLL_EVERY = 0.05
"""Seconds between two checks whether the command has ended or is cancelled."""

_REAP_TRIES = 20
"""Checks whether a killed command has ended."""

_SIGNALS_OF_DAEMON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGIO)
"""Signals that the daemon blocks or ignores; a command gets their defaults."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The end of a command: its exit code, negative for a signal, and the first bytes of its output.

    `exit_code` is None if it was killed, at the time limit or because the run was cancelled.
    """

    exit_code: int | None
    output: bytes
    is_cancelled: bool = False


def run_command(
    arguments: Sequence[str],
    stdin: bytes,
    environ: Mapping[str, str],
    timeout: float,
    *,
    is_cancelled: Callable[[], bool],
    with_stderr: bool,
    max_output: int = MAX_OUTPUT,
) -> CommandResult:
    """Run a program, given by its absolute path, until it ends or for `timeout` seconds.

    It has a process group of its own, which is killed at the end of the time. Output is that of standard
    output, and of standard error if `with_stderr`; its first `max_output` bytes are kept. Raises OSError if
    the program can't be started.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            pid = _spawn(arguments, stdin, environ, writer, with_stderr=with_stderr)
        finally:
            os.close(writer)
        return _wait(pid, reader, time.monotonic() + timeout, is_cancelled, max_output)
    finally:
        os.close(reader)


def _spawn(
    arguments: Sequence[str], stdin: bytes, environ: Mapping[str, str], output: int, *, with_stderr: bool
) -> int:
    # `subprocess` cannot reset the blocked signals of a child: the daemon blocks SIGTERM in all threads
    source = os.memfd_create("stdin")
    devnull = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with open(source, "wb", closefd=False) as stream:
            stream.write(stdin)
        os.lseek(source, 0, os.SEEK_SET)
        os.set_blocking(output, True)  # the flag is shared with the child
        return os.posix_spawn(
            arguments[0],
            list(arguments),
            dict(environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, source, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output if with_stderr else devnull, 2),
            ],
            setpgroup=0,
            setsigmask=(),
            setsigdef=_SIGNALS_OF_DAEMON,
        )
    finally:
        os.close(devnull)
        os.close(source)


def _wait(
    pid: int, reader: int, until: float, is_cancelled: Callable[[], bool], max_output: int
) -> CommandResult:
    output, cancelled = bytearray(), False
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while (left := until - time.monotonic()) > 0 and not (cancelled := is_cancelled()):
        # the end of the program closes the pipe, unless one of its children has it open
        if poll.poll(min(left, _POLL_EVERY) * 1000) and not _read(reader, output, max_output):
            poll.unregister(reader)
        if (exit_code := _exit_code(pid)) is not None:
            while len(output) < max_output and _read(reader, output, max_output):  # what is left in the pipe
                pass
            return CommandResult(exit_code, bytes(output))
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for _ in range(_REAP_TRIES):  # a process that hangs in the kernel is left to init
        if _exit_code(pid) is not None:
            break
        time.sleep(_POLL_EVERY)
    return CommandResult(None, bytes(output), cancelled)


def _exit_code(pid: int) -> int | None:
    """Return the exit code of a child that has ended, and forget it; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _read(reader: int, output: bytearray, max_output: int) -> bool:
    """Read what is in the pipe and keep it while there is room; return whether there may be more."""
    try:
        chunk = os.read(reader, _CHUNK)
    except BlockingIOError:
        return False
    output += chunk[: max_output - len(output)]
    return bool(chunk)
