"""Checksum files: their names, and their content in the formats of coreutils, BSD's md5 and openssl."""

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
"""Suffixes that make an archive's name that of its own checksum file, and their algorithms."""

DIRECTORY_CHECKSUM_FILES = {
    name: algorithm
    for algorithm in ALGORITHMS
    for stem in (algorithm.encode() + b"sum", algorithm.encode() + b"sums")
    for name in (stem, stem.upper(), stem + b".txt", stem.upper() + b".txt")
}
"""Names of checksum files for all archives of a directory, and their algorithms."""

_HEX = re.compile(rb"[0-9a-fA-F]+")
_TAGGED = re.compile(rb"(\\?)([A-Za-z0-9/-]+) ?\((.+)\) ?= ?([0-9a-fA-F]+)")
_PLAIN = re.compile(rb"(\\?)([0-9a-fA-F]{32,128})(?: [ *]|[ \t]+\*?)(.+)")
_ESCAPE = re.compile(rb"\\(.)")
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"\\": b"\\"}


@dataclass(frozen=True, slots=True)
class _ChecksumLine:
    """One line: its digest, and the algorithm and base name if the line has them."""

    algorithm: str | None
    hex: str
    name: bytes | None


def is_checksum_name(name: bytes) -> bool:
    """Return whether a base name is that of a checksum file."""
    return name in DIRECTORY_CHECKSUM_FILES or archive_name_of(name) is not None


def archive_name_of(name: bytes) -> bytes | None:
    """Return the name of the archive that a checksum file belongs to; None if it is not for one archive."""
    stem, dot, suffix = name.rpartition(b".")
    return stem if stem and dot + suffix in _SUFFIXES else None


def checksum_file_names(name: bytes) -> dict[bytes, str]:
    """Return the names that an archive's own checksum file can have, and the algorithm of each."""
    return {
        name + suffix: algorithm for suffix, algorithm in _SUFFIXES.items() if len(name + suffix) <= NAME_MAX
    }


def digest_in_single(text: bytes, name: bytes, algorithm: str) -> Digest | None:
    """Return the digest in an archive's own checksum file, None if it holds none of this algorithm.

    A single line applies whatever name it has; of several lines, the last one with the archive's name does.
    """
    lines = list(_parse_lines(text))
    if len(lines) > 1:
        lines = [line for line in lines if line.name == name][-1:]
    return _digest(lines[0], algorithm) if lines else None


def digest_in_list(text: bytes, name: bytes, algorithm: str) -> Digest | None:
    """Return the digest of an archive in the checksum file of its directory, None if it holds none.

    The last line with the archive's name applies.
    """
    named = [line for line in _parse_lines(text) if line.name == name]
    return _digest(named[-1], algorithm) if named else None


def _digest(line: _ChecksumLine, algorithm: str) -> Digest | None:
    if line.algorithm not in (None, algorithm) or len(line.hex) != _HEX_DIGITS[algorithm]:
        return None
    return Digest(algorithm, line.hex)


def _parse_lines(text: bytes) -> Iterator[_ChecksumLine]:
    for raw in text.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        line = raw.rstrip(b"\r")
        if _HEX.fullmatch(line.strip()):
            yield _ChecksumLine(None, line.strip().decode().lower(), None)
        elif match := _TAGGED.fullmatch(line):
            escaped, tag, name, value = match.groups()
            algorithm = tag.decode().lower().replace("sha2-", "sha").replace("-", "")
            yield _ChecksumLine(algorithm, value.decode().lower(), _base_name(name, escaped))
        elif match := _PLAIN.fullmatch(line):
            escaped, value, name = match.groups()
            if len(value) in _BY_DIGITS:
                yield _ChecksumLine(None, value.decode().lower(), _base_name(name, escaped))


def _base_name(name: bytes, escaped: bytes) -> bytes:
    """Return the base name in a line, which starts with a backslash if the name is escaped."""
    if escaped:
        name = _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[0]), name)
    return name.rpartition(b"/")[2]
