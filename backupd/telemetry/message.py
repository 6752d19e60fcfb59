"""The `message` of a log line: the template of its event, filled with the values of its keys.

A template has keys in braces. A part of it in square brackets is left out where one of its keys is missing,
empty or 0. Values are never expanded: braces and brackets in a file name stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

from backupd.core.names import printable
from backupd.core.units import human_duration, human_size

_FILE_NAMES = frozenset(("archive", "config", "device", "moved_to", "path"))
"""Keys of file names, which are quoted if they contain spaces or quotes so that a reader sees their end."""

_PART = re.compile(r"\[([^\]]*)\]|([^\[]+)")
_KEY = re.compile(r"\{(\w+)\}")
_NEEDS_QUOTES = re.compile(r"[\s\"']|^$")


class _Slot(NamedTuple):
    """Literal text, followed by the value of a key unless the key is empty."""

    text: str
    key: str
    show: Callable[[object], str]


class _Part(NamedTuple):
    """A piece of a template; it is left out if one of the keys in `needed` has no value, or 0."""

    needed: tuple[str, ...]
    slots: tuple[_Slot, ...]


def render(template: str, values: Mapping[str, object]) -> str:
    """Return one printable line: `template` with `values`; a missing key outside of brackets becomes "?"."""
    words: list[str] = []
    for needed, slots in _compile(template):
        if any(_is_empty(key, values.get(key)) for key in needed):
            continue
        for text, key, show in slots:
            words.append(text)
            if key:
                value = values.get(key)
                words.append("?" if value is None else show(value))
    return "".join(words)


def required_keys(template: str) -> set[str]:
    """Return the keys of a template that are outside of brackets."""
    return {slot.key for needed, slots in _compile(template) if not needed for slot in slots if slot.key}


def keys_of(template: str) -> set[str]:
    """Return all keys of a template."""
    return set(_KEY.findall(template))


def _is_empty(key: str, value: object) -> bool:
    return value is None or value in ("", []) or (value == 0 and key != "days_left")


@cache
def _compile(template: str) -> tuple[_Part, ...]:
    """Return the parts of a template; there are as many templates as events."""
    parts = []
    for optional, required in _PART.findall(template):
        pieces = _KEY.split(optional or required)  # text, key, text, key, …, text
        slots = [
            _Slot(text, key, _shown_as(key))
            for text, key in zip(pieces[::2], [*pieces[1::2], ""], strict=True)
        ]
        needed = tuple(slot.key for slot in slots if slot.key) if optional else ()
        parts.append(_Part(needed, tuple(slots)))
    return tuple(parts)


def _shown_as(key: str) -> Callable[[object], str]:
    """Return the function that turns values of a key into text."""
    if key in _FILE_NAMES:
        return _file_name
    if key.endswith("_s") and not key.endswith("_per_s"):
        return _seconds
    if key.endswith("_bytes"):
        return _bytes
    return _days if key == "days_left" else _text


def _file_name(value: object) -> str:
    text = str(value)
    if not _NEEDS_QUOTES.search(text):
        return _printable(text)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_printable(escaped)}"'


def _seconds(value: object) -> str:
    if not isinstance(value, int | float):
        return _text(value)
    sign, seconds = "-" if value < 0 else "", abs(value)
    return f"{sign}{round(seconds, 1):g} s" if seconds < 10 else sign + human_duration(seconds)


def _bytes(value: object) -> str:
    return human_size(value) if isinstance(value, int) else _text(value)


def _days(value: object) -> str:
    if isinstance(value, int) and value < 0:
        return f"expired {-value} days ago" if value < -1 else "expired"
    return f"{value} day left" if value == 1 else f"{value} days left"


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    text = str(value)
    if "\n" in text:  # an error with several lines
        text = "; ".join(line.strip() for line in text.splitlines() if line.strip()).replace(":; ", ": ")
    return _printable(text)


def _printable(text: str) -> str:
    return text if text.isprintable() else printable(text)
