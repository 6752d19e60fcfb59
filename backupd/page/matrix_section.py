"""The matrix of devices by days as HTML.

A row is one SVG. Equal days in a row are one path, and a pattern draws the mark of each day, so that a
thousand devices take a few hundred bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import groupby

from backupd.core.device_matrix import GAPS, CalendarDay, DayState, DeviceRow
from backupd.page.markup import counted, short_day, text

PITCH = 18
"""The width of a day in pixels."""

MAX_ROWS = 2000
"""The largest number of rows that are shown."""

_MAX_TITLES = 1500
"""The largest number of marks with a title of their own; those of devices with gaps come first."""

_MARKS = {
    DayState.DELIVERED: ("d", "delivered"),
    DayState.LATE: ("l", "delivered, later than expected"),
    DayState.WAITING: ("w", "arrived, not delivered yet"),
    DayState.REJECTED: ("r", "rejected"),
    DayState.MISSING: ("m", "missing"),
    DayState.NONE: ("n", "none expected"),
}
"""The class and the meaning of each mark."""

_UNUSUAL = "an archive of unusual size"

PATTERNS = resources.files("backupd.page").joinpath("marks.svg").read_text("utf-8")
"""The drawings of the marks, which the style of the page refers to."""


def matrix_section(rows: Sequence[DeviceRow], calendar: Sequence[CalendarDay]) -> Iterator[str]:
    """Yield the section of the matrix."""
    yield f"<section><h2 id=devices>Backups of the last {len(calendar)} days</h2>\n"
    if not rows:
        yield "<p class=quiet>No archive has arrived yet, and no device is expected.</p></section>\n"
        return
    gaps = sum(row.has_gap for row in rows)
    is_missing = sum(row.is_missing_now for row in rows)
    yield f"<p class=quiet>{is_missing:,} of {len(rows):,} missing now, {gaps:,} with a gap</p>\n"
    yield PATTERNS
    yield _legend()
    yield "<div class='scroll matrix' tabindex=0 role=region aria-labelledby=devices><table>\n"
    yield "<caption class=hidden>Devices by days, the newest day last</caption>\n"
    yield f"<thead><tr><th scope=col>device<th scope=col>days with a backup<th scope=col>{_scale(calendar)}\n"
    yield from _bodies(rows[:MAX_ROWS], calendar)
    yield "</table></div>\n"
    if len(rows) > MAX_ROWS:
        yield f"<p class=quiet>{len(rows) - MAX_ROWS:,} more devices are not shown.</p>\n"
    yield "</section>\n"


def _legend() -> str:
    samples = [(f"<path class={mark} d=M0,8H{PITCH} />", meaning) for mark, meaning in _MARKS.values()]
    samples.append((f"{samples[0][0]}<path class=u d=M9,8h0 />", _UNUSUAL))
    entries = (
        f"<li><svg width={PITCH} height=16 aria-hidden=true>{drawing}</svg>{meaning}"
        for drawing, meaning in samples
    )
    return f"<ul class=legend>{''.join(entries)}</ul>\n"


def _scale(calendar: Sequence[CalendarDay]) -> str:
    """Return the heading of the days: the date of each seventh one, counted from the newest."""
    last = len(calendar) - 1
    labels = [
        f"<text x={(last - back) * PITCH + PITCH - 1} y=12>{short_day(calendar[last - back].name)}</text>"
        for back in range(0, len(calendar), 7)
        if (last - back) * PITCH >= 3 * PITCH or last < 4
    ]
    span = f"{short_day(calendar[0].name)} to {short_day(calendar[-1].name)}"
    size = f"width={len(calendar) * PITCH} height=16"
    drawing = f"<svg class=scale {size} aria-hidden=true>{''.join(reversed(labels))}</svg>"
    return f"<span class=hidden>{span}</span>{drawing}"


def _bodies(rows: Sequence[DeviceRow], calendar: Sequence[CalendarDay]) -> Iterator[str]:
    days = [short_day(day.name) for day in calendar]
    titles = _MAX_TITLES
    for drop, group in groupby(rows, key=lambda row: row.drop):
        members = list(group)
        yield "<tbody>"
        has_heading = len(members) > 1 or members[0].device != ""
        if has_heading:
            yield f"<tr class=drop><th scope=rowgroup>{text(drop)}<td colspan=2>"
            yield f"{counted(len(members), 'device')}\n"
        for row in members:
            drawing, titled = _drawing(row, days, titles)
            titles -= titled
            name = (text(row.device) or "<i>other files</i>") if has_heading else text(drop)
            kind = "" if has_heading else " class=drop"
            yield f"<tr{kind}><th scope=row>{name}<td>{_summary(row, days)}<td><svg>{drawing}</svg>\n"


def _summary(row: DeviceRow, days: Sequence[str]) -> str:
    """Return the counts of a row, such as `28/30, 2 missing`."""
    states = row.states
    gaps = sum(state in GAPS for state in states)
    expected = len(states) - states.count(DayState.NONE)
    parts = [f"{expected - gaps}/{expected}"]
    if row.is_missing_now:
        first = len(states)
        while first and states[first - 1] in GAPS:
            first -= 1
        parts.append(f"<b>missing since {days[first]}</b>" if first else "<b>missing</b>")
    else:
        counts = ((states.count(state), state) for state in (DayState.MISSING, DayState.REJECTED))
        parts += [f"{count} {state}" for count, state in counts if count]
    if row.unusual:
        parts.append(f"{len(row.unusual)} unusual")
    return ", ".join(parts)


def _drawing(row: DeviceRow, days: Sequence[str], titles: int) -> tuple[str, int]:
    """Return the paths of a row and the number of titles in them, which is `titles` at most."""
    lines: dict[DayState, str] = {}
    titled: list[str] = []
    start = 0
    for state, group in groupby(row.states):
        end = start + len(list(group))
        line = f"M{start * PITCH},8H{end * PITCH}"
        mark, meaning = _MARKS[state]
        if state in (DayState.DELIVERED, DayState.NONE) or len(titled) >= titles:
            lines[state] = lines.get(state, "") + line
        else:
            span = days[start] if end == start + 1 else f"{days[start]} to {days[end - 1]}"
            titled.append(f"<path class={mark} d={line}><title>{span}: {meaning}</title></path>")
        start = end
    drawn = [f"<path class={_MARKS[state][0]} d={line} />" for state, line in lines.items()]
    for day in row.unusual:
        title = f"<title>{days[day]}: {_UNUSUAL}</title>"
        titled.append(f"<path class=u d=M{day * PITCH + PITCH // 2},8h0>{title}</path>")
    return "".join([*drawn, *titled]), len(titled)
