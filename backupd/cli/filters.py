"""What people give to name a time or an archive by: `7d`, `2026-03-01`, `*.cfg`, `site=north`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from backupd.core.errors import UsageError
from backupd.core.names import as_text

if TYPE_CHECKING:
    from backupd.config.models import Config


def time_of(option: str, text: str, now: datetime) -> datetime | None:
    """Return the time that is meant: so long ago, or a date and time, of the local zone unless it says."""
    from backupd.config.quantities import parse_duration  # noqa: PLC0415

    if not text:
        return None
    try:
        return now - parse_duration(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{option}: expected a time, got {text!r}", 'write "7d" for so long ago, or "2026-03-01T06:00"'
        ) from error


def known(option: str, name: str, names: Sequence[str]) -> str | None:
    """Return a name of the configuration, None for none; raises UsageError for one that is not there."""
    if name and name not in names:
        raise UsageError(f"{option}: there is no {name!r}", f"there are: {', '.join(names)}")
    return name or None


def matcher(config: Config, name: str, labels: Sequence[str]) -> Callable[[str, bytes], bool]:
    """Return what tells of a drop and a path whether name pattern and labels (`KEY=VALUE`) fit."""
    pattern = re.compile(fnmatch.translate(name), re.IGNORECASE) if name else None
    wanted = dict(_label(config, text) for text in labels)
    patterns = {n: re.compile(d.label_pattern) for n, d in config.drop.items() if d.label_pattern}

    def matches(drop: str, relpath: bytes) -> bool:
        path = as_text(relpath)
        if pattern and not pattern.match(path if "/" in name else path.rpartition("/")[2]):
            return False
        if not wanted:
            return True
        match = patterns[drop].fullmatch(path) if drop in patterns else None
        return match is not None and all(match.groupdict().get(k) == v for k, v in wanted.items())

    return matches


def _label(config: Config, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    groups = {
        g for d in config.drop.values() if d.label_pattern for g in re.compile(d.label_pattern).groupindex
    }
    if not equals:
        raise UsageError(f"--label: expected KEY=VALUE, got {text!r}", "such as `--label site=north`")
    if key not in groups:
        raise UsageError(
            f"no label_pattern has a group named {key!r}",
            f"there are: {', '.join(sorted(groups))}" if groups else "give a drop a `label_pattern`",
        )
    return key, value
