"""A filesystem of its own, from which the power can be cut: whatever was not synced is gone then."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.privileges import IS_ROOT
from tests.programs import do_without

_OPTIONS = "commit=600"
"""Nothing reaches the disk by itself: only what is synced."""


def _run(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


class Disk:
    """An ext4 filesystem in a file, mounted on a folder."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image, self._folder = image, folder

    def mount(self) -> None:
        """Mount it, by whichever device is free."""
        with self._attached() as device:
            _run("mount", "-o", _OPTIONS, device, self._folder)

    def power_on(self) -> None:
        """Mount it anew after the power was cut; like a boot may, that gives it another number."""
        before = self._folder.stat().st_dev
        with self._attached() as device:
            _run("umount", self._folder)
            _run("mount", "-o", _OPTIONS, device, self._folder)
        assert self._folder.stat().st_dev != before

    @contextlib.contextmanager
    def _attached(self) -> Iterator[str]:
        """Yield a device for it, which is there for as long as that is mounted."""
        device = _run("losetup", "--find", "--show", self._image).strip()
        try:
            yield device
        finally:
            _run("losetup", "--detach", device)


@contextlib.contextmanager
def a_disk(image: Path, folder: Path, size: int = 64_000_000) -> Iterator[Disk]:
    """Yield a new disk, mounted; skip the test where there can be none."""
    if not IS_ROOT or shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
        do_without("needs root, and mkfs.ext4")
    with image.open("wb") as stream:
        stream.truncate(size)
    _run("mkfs.ext4", "-q", "-F", image)
    disk = Disk(image, folder)
    try:
        disk.mount()
    except subprocess.CalledProcessError as error:
        do_without(f"no loop device can be mounted: {error.stderr}")
    try:
        yield disk
    finally:
        # the daemon was told to end, and may still be about it
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
