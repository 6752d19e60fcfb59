"""The values that templates can name."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from backupd.core.model import Archive
from backupd.core.names import as_text

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def variables(archive: Archive, host: str, pattern: re.Pattern[str] | None) -> dict[str, str]:
    """Return the values for `{name}` and friends, and for the named groups of a label pattern.

    `mtime` is RFC 3339 in UTC. A group that takes no part in the match is empty.
    """
    relpath = as_text(archive.relpath)
    name = relpath.rpartition("/")[2]
    stem = name.partition(".")[0] or name
    labels: dict[str, str] = {}
    if pattern is not None:
        match = pattern.fullmatch(relpath)
        labels = {group: (match[group] or "") if match else "" for group in pattern.groupindex}
    return {
        **labels,
        "name": name,
        "stem": stem,
        "relpath": relpath,
        "drop": archive.drop,
        "host": host,
        "size": str(archive.fingerprint.size),
        "mtime": _rfc3339(archive.fingerprint.mtime_ns),
    }


def _rfc3339(time_ns: int) -> str:
    """Return a time of a file, the nearest that can be written for one that no calendar has."""
    try:
        time = _EPOCH + timedelta(seconds=time_ns // 1_000_000_000)
    except OverflowError:
        time = _LAST if time_ns > 0 else _FIRST
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")
