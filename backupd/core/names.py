"""File names, which are bytes, as text that can do no harm, and new names for files that move."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime

NAME_MAX = 255
"""Bytes in a name on Linux filesystems."""

RECORDS = 99
"""Names that are tried for the record beside an archive, where others have the first ones."""

LARGEST_RECORD = 128 * 1024
"""Bytes of a record that is believed: long receipts of many destinations."""


def as_text(name: bytes) -> str:
    r"""Return a file name as valid Unicode; bytes that are no UTF-8 become `\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """Return text for a terminal: control characters, line ends and direction marks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def fitted(name: bytes, suffix: bytes) -> bytes:
    """Return name + suffix, the name cut and marked by its digest where both would not fit."""
    if len(name) + len(suffix) <= NAME_MAX:
        return name + suffix
    mark = b"~" + hashlib.sha256(name).hexdigest()[:8].encode("ascii")
    return name[: NAME_MAX - len(suffix) - len(mark)] + mark + suffix


def record_name(name: bytes, kind: bytes, number: int = 1) -> bytes:
    """Return the name of the record beside an archive: a `receipt` or `reason`, the first or a further."""
    return fitted(name, b".%s.json" % kind if number == 1 else b".%s-%d.json" % (kind, number))


def free_names(name: bytes, when: datetime) -> Iterator[bytes]:
    """Yield a name, then ones with a time and a number behind it, for the first that is not taken."""
    yield name
    stamp = when.strftime(".%Y%m%dT%H%M%SZ").encode("ascii")
    yield fitted(name, stamp)
    number = 2
    while True:
        yield fitted(name, stamp + b"-%d" % number)
        number += 1
