"""Text and times as HTML."""

from __future__ import annotations

import html
from datetime import UTC, datetime

from backupd.core.names import printable
from backupd.core.units import human_size

_MAX_TEXT = 500
"""The number of characters after which a text from outside is cut."""


def text(value: object) -> str:
    """Return a text as HTML, for elements and quoted attributes.

    Control characters and direction marks are escaped, and a long text is cut.
    """
    plain = str(value)
    cut = plain if len(plain) <= _MAX_TEXT else f"{plain[:_MAX_TEXT]}…"
    return html.escape(printable(cut))


def remedy(hint: str) -> str:
    """Return a hint as HTML, in which the commands between backquotes are code."""
    parts = text(hint).split("`")
    if len(parts) % 2 == 0:  # a backquote without its end
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def time_tag(at: datetime | None, now: datetime) -> str:
    """Return a time in the host's time zone as HTML, with its date unless that is today; `-` for None."""
    if at is None:
        return "-"
    local, today = at.astimezone(), now.astimezone()
    if local.date() == today.date():
        shown = f"{local:%H:%M}"
    elif local.year == today.year:
        shown = f"{local.day} {local:%b %H:%M}"
    else:
        shown = f"{local.day} {local:%b %Y}"
    return f'<time datetime="{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}">{shown}</time>'


def short_day(day: str) -> str:
    """Return a day such as 2026-03-01 as `1 Mar`."""
    parsed = datetime.fromisoformat(day)
    return f"{parsed.day} {parsed:%b}"


def size_text(count: int) -> str:
    """Return a number of bytes that no line break separates from its unit."""
    return human_size(count).replace(" ", "\u00a0")


def counted(number: int, noun: str) -> str:
    """Return a number with a noun, which gets an s unless there is one of it."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
