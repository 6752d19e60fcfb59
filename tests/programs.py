"""Programs of the system that tests need."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

_ALSO_IN = "/usr/local/sbin:/usr/sbin:/sbin"


def find(program: str) -> str | None:
    """Return the path of a program, if it is on this machine."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=f"{path}:{_ALSO_IN}")


def require(program: str) -> str:
    """Return the path of a program; without it the test is skipped, or fails where CI is set."""
    return find(program) or do_without(f"{program} is not on this machine")


def do_without(reason: str) -> NoReturn:
    """Skip the test, or fail it where CI is set: what CI skips is checked by nobody."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
