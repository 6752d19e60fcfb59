"""Which names, kinds and sizes qualify as an archive."""

from __future__ import annotations

import fnmatch
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from backupd.core.checksum import is_checksum_name

_TEMPORARY = re.compile(
    r"(?:\..*|.*~|~.*|#.*#|.*\.(?:part|partial|tmp|temp|filepart|crdownload|swp|swx|lock|writing|upload|inprogress))",
    re.IGNORECASE | re.DOTALL,
)
"""Hidden names, and what editors, browsers, WinSCP, rsync and friends write before they rename."""


class Ineligible(StrEnum):
    """Why something in a drop folder is no archive; the `reason` key of `archive.ignored`."""

    TEMPORARY = "temporary_name"
    EXCLUDED = "excluded"
    CHECKSUM = "checksum_file"
    NOT_INCLUDED = "not_included"
    SYMLINK = "symlink"
    SPECIAL = "not_a_regular_file"
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"


def is_temporary(name: bytes) -> bool:
    """Tell whether a base name is one that a writer uses before it is done."""
    return _TEMPORARY.fullmatch(name.decode("utf-8", "surrogateescape")) is not None


@dataclass(frozen=True, slots=True)
class Patterns:
    """Shell patterns, matched without regard to case.

    A pattern with a slash is matched against the path relative to the drop folder, another one against
    the base name.
    """

    patterns: tuple[str, ...]
    _of_name: re.Pattern[str] = field(init=False, repr=False)
    _of_path: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_of_name", _union(p for p in self.patterns if "/" not in p))
        object.__setattr__(self, "_of_path", _union(p for p in self.patterns if "/" in p))

    def match(self, relpath: bytes) -> bool:
        """Tell whether any pattern matches."""
        path = relpath.decode("utf-8", "surrogateescape")
        name = path.rpartition("/")[2]
        return self._of_name.match(name) is not None or self._of_path.match(path) is not None


def _union(patterns: Iterable[str]) -> re.Pattern[str]:
    parts = [fnmatch.translate(p) for p in patterns]
    return re.compile("|".join(parts) if parts else r"(?!)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Eligibility:
    """A drop's rules of what an archive is; sizes in bytes, `max_size` None for no limit.

    `checksums` tells whether checksum files are read as such, and so are no archives.
    """

    include: Patterns
    exclude: Patterns
    min_size: int
    max_size: int | None
    checksums: bool = False

    def of_name(self, relpath: bytes) -> Ineligible | None:
        """Return why a path can't be an archive by its name, or None."""
        if is_temporary(relpath.rpartition(b"/")[2]):
            return Ineligible.TEMPORARY
        if self.exclude.match(relpath):
            return Ineligible.EXCLUDED
        if self.checksums and is_checksum_name(relpath.rpartition(b"/")[2]):
            return Ineligible.CHECKSUM
        if not self.include.match(relpath):
            return Ineligible.NOT_INCLUDED
        return None

    def of_file(self, mode: int, size: int) -> Ineligible | None:
        """Return why a file can't be an archive by its `st_mode` and size, or None."""
        if stat.S_ISLNK(mode):
            return Ineligible.SYMLINK
        if not stat.S_ISREG(mode):
            return Ineligible.SPECIAL
        if size < self.min_size:
            return Ineligible.TOO_SMALL
        if self.max_size is not None and size > self.max_size:
            return Ineligible.TOO_LARGE
        return None
