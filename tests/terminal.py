"""A terminal for a command: what is on its screen, and the keys that are typed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyte

from tests.stage import TIMEOUT, Stage

CTRL_C = b"\x03"


class Terminal:
    """Runs `backupd` with a terminal of a size for its input and outputs; the end of the block kills it.

    `stdout` is a descriptor that takes its standard output instead.
    """

    def __init__(
        self,
        config: Stage | Path,
        arguments: Sequence[str],
        *,
        columns: int = 80,
        lines: int = 24,
        environ: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
            if stdout is not None:
                os.dup2(stdout, 1)
            path = config.config if isinstance(config, Stage) else config
            ours = {"BACKUPD_CONFIG": str(path), "TERM": "xterm-256color", **(environ or {})}
            inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
            os.execve(sys.executable, [sys.executable, "-m", "backupd", *arguments], {**inherited, **ours})

    @property
    def screen(self) -> pyte.Screen:
        """Return the screen with its colours."""
        return self._screen

    @property
    def display(self) -> list[str]:
        """Return the lines on the screen, without the blanks at their ends."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        """Return everything that was written, as text."""
        return self.written.decode("utf-8", "replace")

    def press(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._fd, keys)

    def until(self, condition: Callable[[], object], description: str) -> None:
        """Read what is written until a condition is true."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            if not self._read() or time.monotonic() > end:
                raise AssertionError(f"waited for {description}; on the screen:\n" + "\n".join(self.display))

    def wait(self) -> int:
        """Read until the command has ended, and return its exit code."""
        end = time.monotonic() + TIMEOUT
        while self._read():
            assert time.monotonic() < end, "\n".join(self.display)
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _read(self) -> bool:
        """Read what was written within a tenth of a second; return whether more may follow."""
        if select.select([self._fd], [], [], 0.1)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # no process has the other end open
                return False
            self.written += data
            self._stream.feed(data)
            return bool(data)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)
