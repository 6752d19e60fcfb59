"""Control the preloaded library, which makes system calls of the daemon fail or kills it at one of them."""

from __future__ import annotations

import ctypes
import enum
import mmap
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.programs import do_without

_SOURCE = Path(__file__).with_name("shim.c")
_MAX_CALLS = 4096


class Mode(enum.IntEnum):
    """The effect of the library on the selected call."""

    FAIL = 0
    FAIL_FROM_NOW_ON = 1
    KILL_BEFORE = 2
    KILL_HALFWAY = 3
    CUT_POWER = 4


class _Call(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 16),
        ("step", ctypes.c_int32),
        ("local", ctypes.c_int32),
        ("path", ctypes.c_char * 104),
    )


class _Control(ctypes.Structure):
    _fields_ = (
        ("clock_ahead", ctypes.c_int64),
        ("armed", ctypes.c_int32),
        ("only", ctypes.c_int32),
        ("at", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("network", ctypes.c_int32),
        ("hit", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("calls", _Call * _MAX_CALLS),
    )


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that the library saw: its name, its step, and the path of its file below the root."""

    name: str
    step: int
    is_local: bool
    path: str

    @property
    def on_network(self) -> bool:
        """Whether the call is on a socket."""
        return self.path.startswith("socket:")


class Shim:
    """The library, built for the folder `root`; `environ` makes a daemon load it."""

    def __init__(self, base: Path, root: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            do_without("no C compiler is installed")
        library, page = base / "shim.so", base / "control"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl"], check=True
        )
        page.write_bytes(bytes(ctypes.sizeof(_Control)))
        with page.open("r+b") as stream:
            self._page = mmap.mmap(stream.fileno(), 0)
        self._control = _Control.from_buffer(self._page)
        self.environ = {
            "LD_PRELOAD": str(library),
            "FAULTS_CONTROL": str(page),
            "FAULTS_ROOT": str(root),
        }

    def arm(
        self, step: int = -1, at: int = 0, mode: Mode = Mode.FAIL, error: int = 0, *, network: bool = False
    ) -> None:
        """Count the calls of a step (-1: of all steps) from now on, and inject a fault at call number `at`.

        With 0 for `at` the calls are only recorded. Only calls on files below the root are made to fail, or,
        with `network`, only calls on sockets.
        """
        control = self._control
        control.armed = control.count = control.hit = 0
        control.only, control.at, control.mode, control.error = step, at, mode, error
        control.network = network
        control.armed = 1

    def set_clock(self, ahead: float) -> None:
        """Set the clock of the daemon so many seconds ahead of the clock of the tests."""
        self._control.clock_ahead = int(ahead)

    def disarm(self) -> None:
        """Let every call pass."""
        self._control.armed = 0

    @property
    def hit(self) -> Call | None:
        """The first call with an injected fault, or None."""
        return self._call(self._control.hit) if self._control.hit else None

    @property
    def calls(self) -> list[Call]:
        """The calls since the library was armed."""
        return [self._call(number) for number in range(1, min(self._control.count, _MAX_CALLS - 1) + 1)]

    def _call(self, number: int) -> Call:
        call = self._control.calls[number]
        return Call(call.name.decode(), call.step, bool(call.local), call.path.decode("utf-8", "replace"))
