"""Names: file names as printable text, new names for moved files, and templates with an archive's values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from backupd.core.model import Archive

NAME_MAX = 255
"""Longest file name on Linux filesystems, in bytes."""

_STAMP = re.compile(rb"\.\d{8}T\d{6}Z(-\d+)?$")
"""The end of a new name from `free_names`."""


def as_text(name: bytes) -> str:
    r"""Return a file name as valid Unicode; bytes that are not UTF-8 become `\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """Return a text safe for a terminal: control characters, line ends and direction marks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(name: bytes, suffix: bytes) -> bytes:
    """Return name + suffix; if that is too long, the name is cut and a part of its digest appended to it."""
    if len(name) + len(suffix) <= NAME_MAX:
        return name + suffix
    digest = b"~" + hashlib.sha256(name).hexdigest()[:8].encode("ascii")
    return name[: NAME_MAX - len(suffix) - len(digest)] + digest + suffix


def receipt_file_name(name: bytes, kind: bytes, number: int = 1) -> bytes:
    """Return the name of an archive's receipt file; `kind` is `receipt` or `reason`, `number` starts at 1."""
    return shortened(name, b".%s.json" % kind if number == 1 else b".%s-%d.json" % (kind, number))


def free_names(name: bytes, when: datetime) -> Iterator[bytes]:
    """Yield, without end, the name, the name with a time, then with a time and a rising number.

    The caller takes the first free one.
    """
    yield name
    stamp = when.strftime(".%Y%m%dT%H%M%SZ").encode("ascii")
    yield shortened(name, stamp)
    number = 2
    while True:
        yield shortened(name, stamp + b"-%d" % number)
        number += 1


def without_stamp(path: bytes) -> bytes:
    """Return a path without the time and number that `free_names` may have added to its name."""
    return _STAMP.sub(b"", path)


RECEIPT_NAME = re.compile(rb"\.(receipt|reason)(-\d+)?\.json$")
"""The end of a receipt file's name, see `receipt_file_name`."""


class TemplateError(ValueError):
    """A text is not a valid template; the message has the position of the error."""


def _unchanged(value: str) -> str:
    return value


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A text with `{name}` placeholders; `{{` and `}}` are single braces.

    There are no formats, conversions or attributes: a value is inserted as it is.
    """

    parts: tuple[str | _Placeholder, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the template in `text`; raise TemplateError if it is not valid."""
        return cls(tuple(_parse(text)))

    @property
    def names(self) -> frozenset[str]:
        """Return the names of all placeholders."""
        return frozenset(part.name for part in self.parts if isinstance(part, _Placeholder))

    def render(self, values: Mapping[str, str], escape: Callable[[str], str] = _unchanged) -> str:
        """Return the text with each placeholder replaced by its value.

        `escape` is applied to the values, never to the text around them. A placeholder without a value
        raises KeyError.
        """
        return "".join(part if isinstance(part, str) else escape(values[part.name]) for part in self.parts)


def template_values(archive: Archive, host: str, pattern: re.Pattern[str] | None) -> dict[str, str]:
    """Return the value of each placeholder: the built-in ones, and the named groups of a label pattern.

    `mtime` is in UTC (RFC 3339). The value of a group that did not match is empty.
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


@dataclass(frozen=True, slots=True)
class _Placeholder:
    """The position at which the value `name` is inserted."""

    name: str


_PIECE = re.compile(r"(?P<doubled>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])|(?P<text>[^{}]+)")


def _parse(text: str) -> Iterator[str | _Placeholder]:
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


def _rfc3339(time_ns: int) -> str:
    """Return a file time as text; one before year 1 or after 9999 becomes the nearest valid time."""
    try:
        time = _EPOCH + timedelta(seconds=time_ns // 1_000_000_000)
    except OverflowError:
        time = _LAST if time_ns > 0 else _FIRST
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")
