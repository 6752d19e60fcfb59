"""The tests' side of the preloaded library that makes system calls fail, or the daemon end at them."""

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
_MOST = 4096


class Manner(enum.IntEnum):
    """What happens at the call that is struck."""

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
        ("manner", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("far", ctypes.c_int32),
        ("struck", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("calls", _Call * _MOST),
    )


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that was met: its name, the step it belongs to, and the file, below the root."""

    name: str
    step: int
    is_local: bool
    path: str

    @property
    def is_far(self) -> bool:
        """Tell whether it is one of the network."""
        return self.path.startswith("socket:")


class Shim:
    """A library built for one root; `environ` has a daemon load it."""

    def __init__(self, base: Path, root: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            do_without("there is no C compiler")
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
        self, step: int = -1, at: int = 0, manner: Manner = Manner.FAIL, error: int = 0, *, far: bool = False
    ) -> None:
        """Count the calls of a step, or of all, from now on, and strike the one with that number; 0: none.

        It fails only if it is one of the folder, or of the network where that is `far`.
        """
        control = self._control
        control.armed = control.count = control.struck = 0
        control.only, control.at, control.manner, control.error = step, at, manner, error
        control.far = far
        control.armed = 1

    def set_clock(self, ahead: float) -> None:
        """Have the daemon's clock be so many seconds ahead of ours."""
        self._control.clock_ahead = int(ahead)

    def disarm(self) -> None:
        """Let every call pass."""
        self._control.armed = 0

    @property
    def struck(self) -> Call | None:
        """The call that was struck first, if one was."""
        return self._call(self._control.struck) if self._control.struck else None

    @property
    def calls(self) -> list[Call]:
        """The calls met since it was armed."""
        return [self._call(number) for number in range(1, min(self._control.count, _MOST - 1) + 1)]

    def _call(self, number: int) -> Call:
        call = self._control.calls[number]
        return Call(call.name.decode(), call.step, bool(call.local), call.path.decode("utf-8", "replace"))
