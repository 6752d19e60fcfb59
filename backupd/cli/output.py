"""Print JSON, tables, lines and progress."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from backupd.core.names import as_text, printable
from backupd.core.units import human_duration

_COLUMN_GAP, _EDGES = 3, 2
"""Columns of a terminal between two columns of a table, and at both of its edges together."""

_MIN_WIDTH = 8
"""Columns that a shortened cell keeps at least."""


def print_json(value: object) -> None:
    """Print dataclasses, collections and plain values as JSON; times are ISO 8601, durations seconds."""
    sys.stdout.write(json.dumps(_as_json(value), indent=2) + "\n")


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[object]], shortened: Sequence[str] = ()
) -> None:
    """Print a table of plain text, with each row on one line.

    On a terminal that is too narrow, the cells of the columns in `shortened` lose their middle, those of the
    widest one first. Control characters are escaped, and None is printed as an empty cell.
    """
    console = Console()
    cells = [[printable(str("" if cell is None else cell)) for cell in row] for row in rows]
    if console.is_terminal:
        cells = _fitted(headings, cells, shortened, console.width)
    else:
        console.width = 100_000  # for grep and awk
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*(Text(text, style=_style(cell)) for text, cell in zip(texts, row, strict=True)))
    console.print(table)


def _fitted(
    headings: Sequence[str], cells: list[list[str]], shortened: Sequence[str], width: int
) -> list[list[str]]:
    """Return the cells so that the table is at most `width` columns wide, if `shortened` permits it."""
    widths = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
    flexible = [number for number, heading in enumerate(headings) if heading in shortened]
    excess = sum(widths) + _COLUMN_GAP * (len(widths) - 1) + _EDGES - width
    while excess > 0 and flexible:
        widest = max(flexible, key=lambda number: widths[number])
        if widths[widest] <= _MIN_WIDTH:
            break
        widths[widest], excess = widths[widest] - 1, excess - 1
    return [
        [shorten_middle(text, widths[n]) if n in flexible else text for n, text in enumerate(row)]
        for row in cells
    ]


def shorten_middle(text: str, width: int) -> str:
    """Return a text in at most `width` columns of a terminal; a longer one has a `…` in its middle."""
    if cell_len(text) <= width:
        return text
    head = max(width - 1, 0) // 2
    tail = max(width - 1 - head, 0)
    return f"{set_cell_size(text, head)}…{set_cell_size(text[::-1], tail)[::-1]}"


def print_line(text: str, style: str = "") -> None:
    """Print a line, in the `style` of rich if standard output is a terminal and NO_COLOR is not set.

    A terminal that is too narrow gets several lines with whole words, indented like the first one or more.
    """
    console, line = Console(soft_wrap=True), printable(text)
    if console.is_terminal:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines = textwrap.wrap(
            line, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        line = "\n".join(lines)
    console.print(Text(line, style=style))


def progress_bar(*columns: str | ProgressColumn, hidden: bool, transient: bool = True) -> Progress:
    """Return a progress display on standard error; it is hidden if that is no terminal.

    A transient display is removed at its end. Print nothing to standard output while it is visible.
    """
    console = Console(stderr=True)
    return Progress(
        *columns,
        console=console,
        transient=transient,
        disable=hidden or not console.is_terminal,
        redirect_stdout=False,  # rich would write it to standard error
    )


def shorten_middle(text: str, width: int) -> str:
    """Return a text in at most `width` columns of a terminal; a longer one has a `…` in its middle."""
    if cell_len(text) <= width:
        return text
    head = max(width - 1, 0) // 2
    tail = max(width - 1 - head, 0)
    return f"{set_cell_size(text, head)}…{set_cell_size(text[::-1], tail)[::-1]}"


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
