"""A drop folder for a batch of work: a directory that was opened once stays open until it is closed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from backupd.drop.folder import DropFolder


class HeldFolder(DropFolder):
    """For one thread; `close` lets go of the directories, never of the drop folder itself.

    It closes nothing by itself: a directory may be in use while another is opened.
    """

    def __init__(self, folder: DropFolder) -> None:
        self.path = folder.path
        self._fd = folder.fileno()
        self._held: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Return how many directories are open."""
        return len(self._held)

    def close(self) -> None:
        """Let go of all directories, none of which may be in use; they are opened anew when needed."""
        while self._held:
            os.close(self._held.popitem()[1])

    @contextmanager
    def directory(self, relpath: bytes, *, create: bool = False) -> Iterator[int]:
        """See `DropFolder.directory`."""
        if relpath not in self._held:
            with super().directory(relpath, create=create) as fd:
                self._held[relpath] = os.dup(fd)
        yield self._held[relpath]
