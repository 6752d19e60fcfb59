"""Print JSON, CSV, tables, lines and progress; times and sizes as text.

Times are `machine_time` in JSON and CSV, and `local_time` or relative for people.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.text import Text

from backupd.core.names import as_text, printable
from backupd.core.units import machine_time, short_duration


def print_json(value: object) -> None:
    """Print dataclasses, collections and plain values as JSON; times are RFC 3339, durations seconds."""
    sys.stdout.write(json.dumps(_as_json(value), indent=2) + "\n")


def print_csv(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print CSV with a header line (RFC 4180), one record per line; values are as in JSON, None is empty.

    A text that a spreadsheet would take for a formula gets a quote before it. Control characters are escaped.
    """
    writer = csv.writer(sys.stdout, lineterminator="\r\n")
    writer.writerow(headings)
    writer.writerows([_csv_cell(_as_json(cell)) for cell in row] for row in rows)


def _csv_cell(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return "" if value is None else str(value)
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


_FORMULA_STARTS = ("=", "+", "-", "@")
"""The first characters of a cell that Excel, LibreOffice or Google Sheets evaluates."""


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    shortened: Collection[str] = (),
    omitted: Sequence[str] = (),
) -> bool:
    """Print a table of plain text, one line for each row; return whether it has all columns.

    A blank line is above it, and none below.

    On a terminal that is too narrow, the texts of the columns `shortened` lose their middle, and the columns
    `omitted` are left out. No other column loses anything: if that is not enough, the terminal folds lines.
    Control characters are escaped, and None is printed as an empty cell.
    """
    cells = [[printable(str("" if cell is None else cell)) for cell in row] for row in rows]
    table = _Columns(list(headings), cells)
    console = Console(soft_wrap=True)
    complete = not console.is_terminal or table.shorten(shortened, console.width, _MIN_SHORTENED)
    if not complete:
        table = table.without(omitted)
        table.shorten(shortened, console.width, _MIN_SHORTENED // 2)
    table.print(console)
    return complete


_MIN_SHORTENED = 20
"""Characters of a shortened text below which columns are left out instead; at least half of it remains."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Columns:
    """The cells of a table, and how they are laid out; rich takes minutes for many thousand rows."""

    headings: list[str]
    rows: list[list[str]]

    @property
    def width(self) -> int:
        """Return the columns of a terminal that a line takes."""
        return sum(map(self.width_of, self.headings)) + len(_GAP) * (len(self.headings) - 1)

    def width_of(self, heading: str) -> int:
        """Return the width of a column, 0 if there is none with this heading."""
        if heading not in self.headings:
            return 0
        index = self.headings.index(heading)
        return max(map(cell_len, (heading, *(row[index] for row in self.rows))))

    def without(self, headings: Collection[str]) -> _Columns:
        """Return the table without these columns."""
        kept = [index for index, heading in enumerate(self.headings) if heading not in headings]
        return _Columns([self.headings[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def shorten(self, headings: Collection[str], width: int, least: int) -> bool:
        """Shorten the texts in some columns, in the widest one first, until a line takes `width` columns.

        Each keeps at least so many characters; return whether that was enough.
        """
        widths = {heading: self.width_of(heading) for heading in headings if heading in self.headings}
        excess = self.width - width
        while excess > 0 and max(widths.values(), default=0) > least:
            widest = max(widths, key=lambda heading: widths[heading])
            widths[widest], excess = widths[widest] - 1, excess - 1
        for heading, limit in widths.items():
            index = self.headings.index(heading)
            for row in self.rows:
                row[index] = shorten_middle(row[index], limit)
        return excess <= 0

    def print(self, console: Console) -> None:
        """Print a blank line, the headings, a rule and the rows."""
        widths = [self.width_of(heading) for heading in self.headings]
        console.print()
        console.print(self._line(self.headings, widths, "bold"))
        console.print("─" * self.width)
        for row in self.rows:
            console.print(self._line(row, widths))

    def _line(self, cells: list[str], widths: list[int], style: str = "") -> Text:
        line = Text()
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            line.append(cell, style or _style(cell))
            if index < len(cells) - 1:
                line.append(" " * (width - cell_len(cell)) + _GAP)
        line.rstrip()
        return line


_GAP = "  "
"""The blanks between two columns."""


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


def relative_time(time: datetime | None) -> str:
    """Return a time relative to now, such as `3 min ago` or `in 5 s`; `-` for None."""
    if time is None:
        return "-"
    now = datetime.now(UTC)
    return f"{short_duration(now - time)} ago" if time <= now else f"in {short_duration(time - now)}"


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return as_text(value)
    if isinstance(value, datetime):
        return machine_time(value)
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
    "retried": "yellow",
    "paused": "bold red",
    "held": "yellow",
    "missing": "bold red",
    "changed": "bold red",
    "unreadable": "bold red",
    "probing": "yellow",
    "pending": "yellow",
    "claimed": "cyan",
    "delivered": "green",
    "sent": "green",
    "queued": "green",
    "waits": "yellow",
    "working": "green",
    "ok": "green",
}
"""The styles of cells with exactly this text."""


def _style(cell: object) -> str:
    return _STYLES.get(str(cell), "")
