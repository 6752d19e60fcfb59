"""Checksum files: their names, and what they say, as coreutils, BSD's md5 and openssl write it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from backupd.core.model import DIGEST_BYTES, Digest
from backupd.core.names import NAME_MAX

ALGORITHMS = ("sha256", "sha512", "sha1", "md5", "sha384", "sha224")
_HEX_DIGITS = {algorithm: 2 * DIGEST_BYTES[algorithm] for algorithm in ALGORITHMS}
_BY_DIGITS = {digits: algorithm for algorithm, digits in _HEX_DIGITS.items()}

_SUFFIXES = {
    b"." + case + end: algorithm
    for algorithm in ALGORITHMS
    for case, ends in (
        (algorithm.encode(), (b"", b"sum")),
        (algorithm.upper().encode(), (b"", b"SUM")),
    )
    for end in ends
}
"""Behind an archive's name, for a checksum file of its own."""

LISTS = {
    name: algorithm
    for algorithm in ALGORITHMS
    for stem in (algorithm.encode() + b"sum", algorithm.encode() + b"sums")
    for name in (stem, stem.upper(), stem + b".txt", stem.upper() + b".txt")
}
"""Names of checksum files for a whole directory, and their algorithms."""

_HEX = re.compile(rb"[0-9a-fA-F]+")
_TAGGED = re.compile(rb"(\\?)([A-Za-z0-9/-]+) ?\((.+)\) ?= ?([0-9a-fA-F]+)")
_PLAIN = re.compile(rb"(\\?)([0-9a-fA-F]{32,128})(?: [ *]|[ \t]+\*?)(.+)")
_ESCAPE = re.compile(rb"\\(.)")
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"\\": b"\\"}


@dataclass(frozen=True, slots=True)
class _Line:
    algorithm: str | None
    hex: str
    name: bytes | None


def is_checksum_name(name: bytes) -> bool:
    """Tell whether a base name is that of a checksum file."""
    return name in LISTS or archive_of(name) is not None


def archive_of(name: bytes) -> bytes | None:
    """Return the name of the archive that a checksum file's name belongs to; None for other names."""
    stem, dot, ending = name.rpartition(b".")
    return stem if stem and dot + ending in _SUFFIXES else None


def own_files(name: bytes) -> dict[bytes, str]:
    """Return the names that an archive's own checksum file may have, and their algorithms."""
    return {name + s: algorithm for s, algorithm in _SUFFIXES.items() if len(name + s) <= NAME_MAX}


def digest_in_single(text: bytes, name: bytes, algorithm: str) -> Digest | None:
    """Return what an archive's own checksum file says; None if that is not to be understood.

    One line may have any name, or none; of several, the one with the archive's name counts.
    """
    lines = list(_lines(text))
    if len(lines) > 1:
        lines = [line for line in lines if line.name == name][-1:]
    return _digest(lines[0], algorithm) if lines else None


def digest_in_list(text: bytes, name: bytes, algorithm: str) -> Digest | None:
    """Return what a directory's checksum file says of an archive; the last line with its name counts."""
    named = [line for line in _lines(text) if line.name == name]
    return _digest(named[-1], algorithm) if named else None


def _digest(line: _Line, algorithm: str) -> Digest | None:
    if line.algorithm not in (None, algorithm) or len(line.hex) != _HEX_DIGITS[algorithm]:
        return None
    return Digest(algorithm, line.hex)


def _lines(text: bytes) -> Iterator[_Line]:
    for raw in text.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        line = raw.rstrip(b"\r")
        if _HEX.fullmatch(line.strip()):
            yield _Line(None, line.strip().decode().lower(), None)
        elif match := _TAGGED.fullmatch(line):
            escaped, tag, name, value = match.groups()
            algorithm = tag.decode().lower().replace("sha2-", "sha").replace("-", "")
            yield _Line(algorithm, value.decode().lower(), _base(name, escaped))
        elif match := _PLAIN.fullmatch(line):
            escaped, value, name = match.groups()
            if len(value) in _BY_DIGITS:
                yield _Line(None, value.decode().lower(), _base(name, escaped))


def _base(name: bytes, escaped: bytes) -> bytes:
    if escaped:
        name = _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[0]), name)
    return name.rpartition(b"/")[2]
