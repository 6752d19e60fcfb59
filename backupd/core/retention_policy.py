"""Which sent archives are kept, and for how long."""

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
    """How much of a filesystem has to be free: so many bytes, and so many percent of it."""

    size: int = 0
    percent: float = 0.0

    def of(self, total: int) -> int:
        """Return the bytes that have to be free of a filesystem of `total` bytes."""
        return max(self.size, int(total * self.percent / 100))


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """What a drop keeps of its sent archives; all of them where nothing is given."""

    keep_for: timedelta | None = None
    keep_last: int | None = None
    min_free: MinFree | None = None

    @property
    def expires(self) -> bool:
        """Tell whether archives are removed for their age or number."""
        return self.keep_for is not None or self.keep_last is not None

    def expiry_reason(self, age: timedelta, newer: int) -> Expiry | None:
        """Return why an archive goes, or None where it stays.

        It goes when it is older than `keep_for`, if that is given, and not among the `keep_last` newest
        of its series, if that is given. `age` counts from when it was moved there; `newer` is how many
        archives of its series came after it.
        """
        if self.keep_for is not None and age <= self.keep_for:
            return None
        if self.keep_last is not None and newer < self.keep_last:
            return None
        if self.keep_for is not None:
            return Expiry.TOO_OLD
        return None if self.keep_last is None else Expiry.TOO_MANY


def series_of(relpath: bytes, sent_to: bytes, pattern: re.Pattern[str] | None) -> bytes:
    """Return what an archive is one of: its device's, where a label pattern tells it, else its folder's."""
    if pattern is not None and "device" in pattern.groupindex:
        match = pattern.fullmatch(as_text(relpath))
        if match and match["device"]:
            return b"device " + match["device"].encode("utf-8", "backslashreplace")
    return b"folder " + sent_to.rpartition(b"/")[0]


def smallest_prefix(shortage: int, sizes: Sequence[int]) -> int:
    """Return how many files, from the first on, make up for a shortage of bytes; all if they don't."""
    if shortage <= 0:
        return 0
    too_few = sum(1 for _ in takewhile(lambda total: total < shortage, accumulate(sizes)))
    return min(too_few + 1, len(sizes))
