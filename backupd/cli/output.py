"""Tables, times and sizes for people; rich is imported only where a command prints."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from backupd.config.models import Config
from backupd.config.types import parse_duration
from backupd.core.errors import UsageError
from backupd.core.names import as_text, printable
from backupd.core.units import human_duration


def print_json(value: object) -> None:
    """Print a value of the model as JSON."""
    sys.stdout.write(json.dumps(_plain(value), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return as_text(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table; cells are plain text, whatever they hold."""
    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            *(Text(printable(str("" if cell is None else cell)), style=_style(cell)) for cell in row)
        )
    console = Console()
    if not console.is_terminal:
        console.width = 100_000  # one line a row, for grep and awk
    console.print(table)


def say(text: str, style: str = "") -> None:
    """Print a line, in colour on a terminal that wants it (not with NO_COLOR)."""
    Console(soft_wrap=True).print(Text(printable(text), style=style))


_STYLES = {
    "rejected": "bold red",
    "failed": "bold red",
    "paused": "bold red",
    "no": "bold red",
    "missing": "bold red",
    "changed": "bold red",
    "unreadable": "bold red",
    "EXPIRED": "bold red",
    "probing": "yellow",
    "pending": "yellow",
    "warning": "yellow",
    "claimed": "cyan",
    "delivered": "green",
    "working": "green",
    "ok": "green",
    "yes": "green",
}


def _style(cell: object) -> str:
    return _STYLES.get(str(cell), "")


def ago(time: datetime | None) -> str:
    """Return how long ago a time was, or how soon it comes, such as `3 min ago`."""
    if time is None:
        return "-"
    seconds = (datetime.now(UTC) - time).total_seconds()
    words = human_duration(abs(seconds))
    return f"{words} ago" if seconds >= 0 else f"in {words}"


def time_of(option: str, text: str, now: datetime) -> datetime | None:
    """Return the time that is meant: so long ago, or a date and time, of the local zone unless it says."""
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
