"""Imports that leave out what is for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent(*modules: str) -> Iterator[None]:
    """Let what is imported meanwhile find these modules not installed, unless they are loaded already.

    For optional dependencies of libraries, which load them (and 5 MiB) where they merely can.
    """
    hidden = [name for name in modules if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system's own way to say so
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
