"""The options, folders, certificates and endpoint that all rows share."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.programs import MIB, Backupd, Nginx
from tests.pki import Pki


@dataclass
class Setting:
    """The setting of one invocation of the bench."""

    base: Path
    runs: int
    short: bool
    idle_seconds: float
    pki: Pki
    nginx: Nginx
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def folder(self) -> Path:
        """Return the path of a new folder, which does not exist yet."""
        return self.base / f"work{next(self._numbers)}"

    def backupd(
        self,
        *,
        url: str = "",
        workers: int | None = None,
        drops: int = 1,
        expect: str = "",
        metrics: str = "",
    ) -> Backupd:
        """Return a daemon with folders of its own, not started."""
        return Backupd(
            self.folder(),
            self.pki,
            url or self.nginx.url,
            workers=workers,
            drops=drops,
            expect=expect,
            metrics=metrics,
        )

    def small(self, count: int) -> list[Path]:
        """Create a folder with archives of 20 kB; return their paths."""
        folder = self.folder()
        folder.mkdir()
        paths = [folder / f"small-{number:06}.tar.gz" for number in range(count)]
        for path in paths:
            path.write_bytes(os.urandom(20_000))
        return paths


def large(path: Path, mib: int) -> str:
    """Create an archive of random content; return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for _ in range(mib):
            block = os.urandom(MIB)
            digest.update(block)
            stream.write(block)
    return digest.hexdigest()


def sparse(path: Path, mib: int) -> None:
    """Create a sparse archive without data."""
    with path.open("wb") as stream:
        stream.truncate(mib * MIB)


def warm(*paths: Path) -> None:
    """Read files, so that every program finds them in the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(4 * MIB):
                pass
