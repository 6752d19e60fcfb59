"""The retention policy of a drop: which sent archives are removed, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import accumulate, takewhile

from backupd.core.names import as_text


class Expiry(StrEnum):
    """Why a sent archive is removed; the `reason` key of `archive.expired`."""

    TOO_OLD = "too_old"
    TOO_MANY = "too_many"
    DISK_LOW = "disk_low"


@dataclass(frozen=True, slots=True)
class MinFree:
    """The space to keep free on a filesystem: a number of bytes, or a percentage of its size."""

    size: int = 0
    percent: float = 0.0

    def of(self, total: int) -> int:
        """Return the bytes to keep free on a filesystem of `total` bytes."""
        return max(self.size, int(total * self.percent / 100))


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """The keys `keep_sent_for`, `keep_sent_last` and `min_free` of a drop; None if not set."""

    keep_for: timedelta | None = None
    keep_last: int | None = None
    min_free: MinFree | None = None

    @property
    def expires(self) -> bool:
        """Return whether archives are removed because of their age or number."""
        return self.keep_for is not None or self.keep_last is not None

    def expiry_reason(self, age: timedelta, newer: int) -> Expiry | None:
        """Return why an archive is removed, or None if it is kept.

        It is removed if it is older than `keep_for` and not among the newest `keep_last` of its series; a
        condition that is not set is always met. `age` is the time since the archive was moved to `sent_dir`,
        `newer` the number of archives of its series that were moved later.
        """
        if self.keep_for is not None and age <= self.keep_for:
            return None
        if self.keep_last is not None and newer < self.keep_last:
            return None
        if self.keep_for is not None:
            return Expiry.TOO_OLD
        return None if self.keep_last is None else Expiry.TOO_MANY


def series_of(relpath: bytes, sent_to: bytes, pattern: re.Pattern[str] | None) -> bytes:
    """Return the series that `keep_last` counts an archive in.

    It is that of the archive's device if the group `device` of the label pattern matches, otherwise that of
    the folder that the archive was moved to.
    """
    if pattern is not None and "device" in pattern.groupindex:
        match = pattern.fullmatch(as_text(relpath))
        if match and match["device"]:
            return b"device " + match["device"].encode("utf-8", "backslashreplace")
    return b"folder " + sent_to.rpartition(b"/")[0]


def smallest_prefix(shortage: int, sizes: Sequence[int]) -> int:
    """Return how many files, from the first on, have to be removed to free `shortage` bytes.

    `sizes` are the sizes of the files in bytes. All files are counted if they are not enough.
    """
    if shortage <= 0:
        return 0
    too_few = sum(1 for _ in takewhile(lambda total: total < shortage, accumulate(sizes)))
    return min(too_few + 1, len(sizes))
