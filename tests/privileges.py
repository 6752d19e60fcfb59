"""Run a part of a test without the privileges of root."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IS_ROOT = os.geteuid() == 0

_NOBODY = 65534


@contextmanager
def without_rights() -> Iterator[None]:
    """Switch to the user nobody in all threads, if the tests run as root: root may read every file."""
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
    """Yield a new folder of the user of `without_rights`; only root may enter the folders of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="backupd-test-"))
    folder.chmod(0o755)
    if IS_ROOT:
        os.chown(folder, _NOBODY, _NOBODY)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
