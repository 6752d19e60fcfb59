"""File names, which are bytes, as text that can do no harm, and new names for files that move."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from backupd.core.model import Archive

NAME_MAX = 255
"""Bytes in a name on Linux filesystems."""

RECEIPT_FILE_KINDS = 99
"""Names that are tried for the record beside an archive, where others have the first ones."""

MAX_RECEIPT_FILE_BYTES = 128 * 1024
"""Bytes of a record that is believed: long receipts of many destinations."""


def as_text(name: bytes) -> str:
    r"""Return a file name as valid Unicode; bytes that are no UTF-8 become `\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """Return text for a terminal: control characters, line ends and direction marks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(name: bytes, suffix: bytes) -> bytes:
    """Return name + suffix, the name cut and marked by its digest where both would not fit."""
    if len(name) + len(suffix) <= NAME_MAX:
        return name + suffix
    mark = b"~" + hashlib.sha256(name).hexdigest()[:8].encode("ascii")
    return name[: NAME_MAX - len(suffix) - len(mark)] + mark + suffix


def receipt_file_name(name: bytes, kind: bytes, number: int = 1) -> bytes:
    """Return the name of the record beside an archive: a `receipt` or `reason`, the first or a further."""
    return shortened(name, b".%s.json" % kind if number == 1 else b".%s-%d.json" % (kind, number))


def free_names(name: bytes, when: datetime) -> Iterator[bytes]:
    """Yield a name, then ones with a time and a number behind it, for the first that is not taken."""
    yield name
    stamp = when.strftime(".%Y%m%dT%H%M%SZ").encode("ascii")
    yield shortened(name, stamp)
    number = 2
    while True:
        yield shortened(name, stamp + b"-%d" % number)
        number += 1


_PIECE = re.compile(r"(?P<doubled>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])|(?P<text>[^{}]+)")


class TemplateError(ValueError):
    """A text isn't a template; says where in lower case."""


@dataclass(frozen=True, slots=True)
class _Placeholder:
    """The place of the value called `name`."""

    name: str


def _unchanged(value: str) -> str:
    return value


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A text whose `{name}` placeholders are filled in later; `{{` and `}}` stand for single braces.

    There are no formats, conversions or attributes: a value is put in as it is.
    """

    parts: tuple[str | _Placeholder, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the template that `text` spells, or raise `TemplateError`."""
        return cls(tuple(_parts(text)))

    @property
    def names(self) -> frozenset[str]:
        """The names of all placeholders."""
        return frozenset(part.name for part in self.parts if isinstance(part, _Placeholder))

    def render(self, values: Mapping[str, str], escape: Callable[[str], str] = _unchanged) -> str:
        """Return the text with each placeholder's value, escaped, in its place.

        Only values are escaped, never the text around them. A name without a value is a `KeyError`.
        """
        return "".join(part if isinstance(part, str) else escape(values[part.name]) for part in self.parts)


def _parts(text: str) -> Iterator[str | _Placeholder]:
    for piece in _PIECE.finditer(text):
        match piece.lastgroup:
            case "text":
                yield piece.group()
            case "doubled":
                yield piece.group()[0]
            case "name":
                yield _placeholder(piece.group("name"), piece.start())
            case _:
                raise TemplateError(
                    f'unmatched "{piece.group()}" at character {piece.start() + 1}; '
                    'write "{{" and "}}" for braces'
                )


def _placeholder(name: str, start: int) -> _Placeholder:
    if not name.isidentifier():
        raise TemplateError(
            f'expected a plain name in the braces at character {start + 1}, such as "{{name}}"'
        )
    return _Placeholder(name)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def template_values(archive: Archive, host: str, pattern: re.Pattern[str] | None) -> dict[str, str]:
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
