"""Whether an archive ends as its kind should: quickly told, and never more than a suspicion."""

from __future__ import annotations

import zlib

from backupd.core.inspection import Kind
from backupd.core.tar import BLOCK
from backupd.drop.source import Source
from backupd.drop.zip import has_directory

_BZIP2_END = 0x177245385090
_SHORTEST_GZIP = 18
_TAIL = 4096


def looks_whole(source: Source, kind: Kind) -> bool:
    """Tell whether the end is as it should be; gzip's end tells nothing."""
    tail = source.read(max(source.size - _TAIL, 0), _TAIL)
    match kind:
        case Kind.GZIP:
            return source.size > _SHORTEST_GZIP
        case Kind.BZIP2:
            return _ends_as_bzip2(tail)
        case Kind.XZ:
            return _ends_as_xz(tail)
        case Kind.TAR:
            return source.size > BLOCK and tail.endswith(bytes(BLOCK))
        case Kind.ZIP:
            return has_directory(source)
        case _:
            return False  # to walk through zstd's frames is quick enough


def _ends_as_bzip2(tail: bytes) -> bool:
    """Look for the end's mark, 48 bits that 32 bits of a checksum and 0 to 7 of padding follow."""
    bits = int.from_bytes(tail[-11:], "big") >> 32
    return len(tail) > 14 and any(bits >> pad & (1 << 48) - 1 == _BZIP2_END for pad in range(8))


def _ends_as_xz(tail: bytes) -> bool:
    """Look at the footer; The .xz File Format, section 2.1.2."""
    footer = tail.rstrip(b"\0")[-12:]
    return (
        len(footer) == 12
        and footer[10:] == b"YZ"
        and int.from_bytes(footer[:4], "little") == zlib.crc32(footer[4:10])
    )
