"""Which files in a drop folder are archives, by their name, type and size."""

from __future__ import annotations

import fnmatch
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from backupd.core.checksum import is_checksum_name

_TEMPORARY = re.compile(
    r"(?:\..*|.*~|~.*|#.*#|.*\.(?:part|partial|tmp|temp|filepart|crdownload|opdownload|cyberduckpart"
    r"|part\.minio|gstmp|dpkg-new|swp|swx|lock|writing|upload|inprogress|aria2(?:__temp)?|lftp-pget-status))",
    re.IGNORECASE | re.DOTALL,
)
"""Hidden names, and the names of unfinished files of editors, browsers, WinSCP, rsync and others.

The MinIO client writes `NAME.part.minio`, gcloud `NAME_.gstmp`. Files and folders with such a name are
ignored; after a day they are a problem.
"""

_RUBBISH = re.compile(
    r"(?:thumbs\.db|ehthumbs\.db|desktop\.ini|\.ds_store|\._.*|\.apdisk|\.nfs[0-9a-f]{8,}|\.fuse_hidden[0-9a-f]+"
    r"|@eadir|#recycle|\$recycle\.bin|system volume information|lost\+found|~snapshot|\.snapshots?|\.zfs"
    r"|\.trash.*|\.spotlight-v100|\.fseventsd|\.appledouble|\.temporaryitems|\.ssh|\.git|\.cache|\.config"
    r"|\.local|\.gnupg|\.bash.*|\.profile|\.lesshst|\.viminfo|\.gitkeep|\.keep|\.placeholder|\.backupd-.*)",
    re.IGNORECASE | re.DOTALL,
)
"""Names that file servers, desktops, shells and backupd itself give to what is no backup: always ignored."""

COMPANION_SUFFIXES = (b".part", b".filepart", b".aria2", b".aria2__temp", b".lftp-pget-status", b".st")
"""While a regular file NAME with one of these exists, NAME is still being written, or its download broke off.

aria2 writes its notes to the second of its names and renames them, each time. Source: the documentation of
WinSCP, aria2, lftp and axel; `DefaultBtProgressInfoFile::save` of aria2.
"""


class Ineligible(StrEnum):
    """Why a file in a drop folder is not an archive; the `reason` key of `archive.ignored`."""

    TEMPORARY = "temporary_name"
    EXCLUDED = "excluded"
    CHECKSUM = "checksum_file"
    NOT_INCLUDED = "not_included"
    OWN_NAME = "own_name"
    SUBFOLDER = "subfolder"
    SYMLINK = "symlink"
    SPECIAL = "not_a_regular_file"
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class Patterns:
    """Shell patterns, matched case-insensitively.

    A pattern with a slash is matched against the path relative to the drop folder, one without against the
    base name.
    """

    patterns: tuple[str, ...]
    _of_name: re.Pattern[str] = field(init=False, repr=False)
    _of_path: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_of_name", _union(p for p in self.patterns if "/" not in p))
        object.__setattr__(self, "_of_path", _union(p for p in self.patterns if "/" in p))

    def match(self, relpath: bytes) -> bool:
        """Return whether any pattern matches."""
        path = relpath.decode("utf-8", "surrogateescape")
        name = path.rpartition("/")[2]
        return self._of_name.match(name) is not None or self._of_path.match(path) is not None


@dataclass(frozen=True, slots=True)
class Eligibility:
    """The rules of a drop for which files are archives.

    Sizes are in bytes; `max_size` is None for no limit. With `checksums`, the drop reads checksum files, so
    they are not archives themselves.
    """

    include: Patterns
    exclude: Patterns
    min_size: int
    max_size: int | None
    checksums: bool = False

    def of_name(self, relpath: bytes) -> Ineligible | None:
        """Return why a file with this path is not an archive, None if its path qualifies."""
        name = relpath.rpartition(b"/")[2]
        if (why := self.of_directory(relpath)) is not None:
            return why
        if self.checksums and is_checksum_name(name):
            return Ineligible.CHECKSUM
        if not self.include.match(relpath):
            return Ineligible.NOT_INCLUDED
        return None

    def of_directory(self, relpath: bytes) -> Ineligible | None:
        """Return why the files below a directory with this path are ignored, None if they are not."""
        name = relpath.rpartition(b"/")[2]
        if self.exclude.match(relpath) or _RUBBISH.fullmatch(name.decode("utf-8", "surrogateescape")):
            return Ineligible.EXCLUDED
        return Ineligible.TEMPORARY if is_temporary(name) else None

    def of_file(self, mode: int, size: int) -> Ineligible | None:
        """Return why a file with this `st_mode` and size is not an archive, None if it qualifies."""
        if stat.S_ISLNK(mode):
            return Ineligible.SYMLINK
        if not stat.S_ISREG(mode):
            return Ineligible.SPECIAL
        if size < self.min_size:
            return Ineligible.TOO_SMALL
        if self.max_size is not None and size > self.max_size:
            return Ineligible.TOO_LARGE
        return None


def is_temporary(name: bytes) -> bool:
    """Return whether a base name is one that programs give to a file while they write it."""
    return _TEMPORARY.fullmatch(name.decode("utf-8", "surrogateescape")) is not None


def _union(patterns: Iterable[str]) -> re.Pattern[str]:
    """Return an expression that matches where one of the shell patterns does, never if there are none."""
    expressions = [fnmatch.translate(pattern) for pattern in patterns]
    return re.compile("|".join(expressions) if expressions else r"(?!)", re.IGNORECASE)
