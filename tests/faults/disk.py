"""Disks for tests that run as root: one that loses unsynced data in a power cut, and a small one to fill."""

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
"""Keep the kernel from writing data back by itself: only synced data reaches the disk."""


def _run(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


class Disk:
    """An ext4 filesystem in a file, mounted on a folder."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image, self._folder = image, folder

    def mount(self) -> None:
        """Mount the filesystem through a free loop device."""
        with self._attached() as device:
            _run("mount", "-o", _OPTIONS, device, self._folder)

    def power_on(self) -> None:
        """Mount the filesystem again after a power cut, on another device number, as a boot may do."""
        before = self._folder.stat().st_dev
        with self._attached() as device:
            _run("umount", self._folder)
            _run("mount", "-o", _OPTIONS, device, self._folder)
        assert self._folder.stat().st_dev != before

    @contextlib.contextmanager
    def _attached(self) -> Iterator[str]:
        """Yield a loop device of the image; it exists until the filesystem is unmounted."""
        device = _run("losetup", "--find", "--show", self._image).strip()
        try:
            yield device
        finally:
            _run("losetup", "--detach", device)


@contextlib.contextmanager
def a_small_disk(folder: Path, size: str = "1m") -> Iterator[None]:
    """Mount a filesystem of `size` on a folder during the block."""
    folder.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "backupd-test", folder)
    try:
        yield
    finally:
        _run("umount", "--lazy", folder)


def fill(path: Path) -> Path:
    """Append to a file until its filesystem is full, and return its path."""
    with path.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    return path


@contextlib.contextmanager
def a_disk(image: Path, folder: Path, size: int = 64_000_000) -> Iterator[Disk]:
    """Yield a new disk of `size` bytes, mounted; skip the test where none can be made."""
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
        # the daemon was killed, and its last descriptors may still be open
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
