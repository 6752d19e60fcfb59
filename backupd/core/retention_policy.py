"""The retention policy of a drop: which sent archives are removed, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from heapq import nlargest
from itertools import accumulate, takewhile

from backupd.core.names import as_text, without_stamp


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

    def expiry_reason(self, age: timedelta, *, is_among_newest: bool) -> Expiry | None:
        """Return why an archive is removed, or None if it is kept.

        It is removed if it is older than `keep_for` and not among the newest `keep_last` of its series; a
        condition that is not set is always met. `age` is the time since the archive was moved to `sent_dir`.
        """
        if self.keep_for is not None and age <= self.keep_for:
            return None
        if self.keep_last is not None and is_among_newest:
            return None
        if self.keep_for is not None:
            return Expiry.TOO_OLD
        return None if self.keep_last is None else Expiry.TOO_MANY


@dataclass(frozen=True, slots=True, order=True)
class SentFile:
    """An archive in `sent_dir`; its order is that in which archives were moved there.

    `moved_at` is the time of the move and `mtime_ns` that of the last change of its content. `relpath` is
    relative to the drop folder. `series` is the device or folder of which the newest archives are kept.
    `receipt_path` is set if only this receipt file is left of the archive; `size` is 0 then.
    """

    moved_at: datetime
    relpath: bytes
    drop: str
    size: int
    mtime_ns: int
    series: bytes
    receipt_path: bytes = b""


def newest_of_series(files: Iterable[SentFile], count: int) -> set[bytes]:
    """Return the paths of the newest `count` archives of each series.

    An archive is among them by the time of its move or by that of its content: a backlog may be sent newest
    first, and a copy of `sent_dir` may have new times. A receipt file is among them if its archive would be,
    without taking the place of an archive that is there.
    """
    by_series: dict[bytes, list[SentFile]] = {}
    for file in files:
        by_series.setdefault(file.series, []).append(file)
    newest: set[bytes] = set()
    for members in by_series.values():
        for group in ([file for file in members if not file.receipt_path], members):
            newest |= {file.relpath for file in nlargest(count, group)}
            newest |= {file.relpath for file in nlargest(count, group, key=_content_time)}
    return newest


def _content_time(file: SentFile) -> tuple[int, bytes]:
    return file.mtime_ns, file.relpath


def series_of(sent_to: bytes, below: bytes, pattern: re.Pattern[str] | None) -> bytes:
    """Return the series that `keep_last` counts an archive in.

    It is that of the archive's device if the group `device` of the label pattern matches its path `below`
    `sent_dir`, otherwise that of the folder of `sent_to`. The pattern is matched without the time that a new
    name has got because the name was taken, and with it only if that fails.
    """
    if pattern is not None and "device" in pattern.groupindex:
        for path in dict.fromkeys((without_stamp(below), below)):
            match = pattern.fullmatch(as_text(path))
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
