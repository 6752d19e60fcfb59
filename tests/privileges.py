"""Acting as a user without rights, whoever runs the tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs to be root")

_NOBODY = 65534


@contextmanager
def without_rights() -> Iterator[None]:
    """Be nobody for a while, in all threads, where the tests run as root; root may read everything."""
    if not IS_ROOT:
        yield
        return
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def a_folder_of_nobody() -> Iterator[Path]:
    """Yield a new folder that belongs to whom `without_rights` makes us; pytest's own are root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="backupd-test-"))
    folder.chmod(0o755)
    if IS_ROOT:
        os.chown(folder, _NOBODY, _NOBODY)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
