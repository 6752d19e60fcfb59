"""Print JSON, tables, lines and progress."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from backupd.core.names import as_text, printable
from backupd.core.units import human_duration


def print_json(value: object) -> None:
    """Print dataclasses, collections and plain values as JSON; times are ISO 8601, durations seconds."""
    sys.stdout.write(json.dumps(_as_json(value), indent=2) + "\n")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table of plain text, one row per line unless standard output is a terminal.

    Control characters are escaped, and None is printed as an empty cell.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            *(Text(printable(str("" if cell is None else cell)), style=_style(cell)) for cell in row)
        )
    console = Console()
    if not console.is_terminal:
        console.width = 100_000  # for grep and awk
    console.print(table)


def print_line(text: str, style: str = "") -> None:
    """Print a line, in the `style` of rich if standard output is a terminal and NO_COLOR is not set."""
    Console(soft_wrap=True).print(Text(printable(text), style=style))


def progress_bar(*columns: str | ProgressColumn, hidden: bool) -> Progress:
    """Return a progress display on standard error; it is hidden if that is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal)


def relative_time(time: datetime | None) -> str:
    """Return a time relative to now, such as `3 min ago` or `in 5 s`; `-` for None."""
    if time is None:
        return "-"
    now = datetime.now(UTC)
    return f"{human_duration(now - time)} ago" if time <= now else f"in {human_duration(time - now)}"


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return as_text(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value


_STYLES = {
    "rejected": "bold red",
    "paused": "bold red",
    "missing": "bold red",
    "changed": "bold red",
    "unreadable": "bold red",
    "probing": "yellow",
    "pending": "yellow",
    "claimed": "cyan",
    "delivered": "green",
    "working": "green",
    "ok": "green",
}
"""The styles of cells with exactly this text."""


def _style(cell: object) -> str:
    return _STYLES.get(str(cell), "")
