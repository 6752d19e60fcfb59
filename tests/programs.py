"""Find the system programs that tests need."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

_ALSO_IN = "/usr/local/sbin:/usr/sbin:/sbin"


def find(program: str) -> str | None:
    """Return the path of a program, or None where it is not installed."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=f"{path}:{_ALSO_IN}")


def require(program: str) -> str:
    """Return the path of a program; where it is missing, skip the test, or fail it if CI is set."""
    return find(program) or do_without(f"{program} is not installed")


def do_without(reason: str) -> NoReturn:
    """Skip the test, or fail it if CI is set: a test that CI skips would run nowhere."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
