"""Looking into an archive, in small steps and without unpacking it: whether it is whole.

An inspection is a generator: each step reads a little, and whoever drives it decides how many there are.
Nothing is written, memory is bounded, and archives within an archive are not entered.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator

from backupd.core.archive_formats import (
    BLOCK,
    HEAD,
    ArchiveKind,
    Damage,
    TarError,
    TarWalk,
    UnsoundError,
    expects_tar_inside,
    kind_of,
)
from backupd.core.policy import Reason
from backupd.dropfolder.decompress import CHUNK, BoundedFile, DecompressedOutput, expand
from backupd.dropfolder.zipwalk import has_central_directory, walk_zip
from backupd.dropfolder.zstdwalk import walk_zstd

_BZIP2_END = 0x177245385090
_SHORTEST_GZIP = 18
_TAIL = 4096


def has_valid_end(source: BoundedFile, kind: ArchiveKind) -> bool:
    """Tell whether the end is as it should be; gzip's end tells nothing."""
    tail = source.read(max(source.size - _TAIL, 0), _TAIL)
    match kind:
        case ArchiveKind.GZIP:
            return source.size > _SHORTEST_GZIP
        case ArchiveKind.BZIP2:
            return _ends_as_bzip2(tail)
        case ArchiveKind.XZ:
            return _ends_as_xz(tail)
        case ArchiveKind.TAR:
            return source.size > BLOCK and tail.endswith(bytes(BLOCK))
        case ArchiveKind.ZIP:
            return has_central_directory(source)
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


InspectionSteps = Generator[None, None, Damage | None]


def inspect(fd: int, size: int, name: bytes, *, full: bool) -> InspectionSteps:
    """Return what is wrong with an archive that is open for reading, None if nothing was found.

    Without `full` only the ends are looked at; what is suspicious there is read in full, as only that is
    sure. Raises LimitReachedError where it would take too much to go on, and OSError where it can't be read.
    """
    source = BoundedFile(fd, size)
    kind = kind_of(name, source.read(0, HEAD))
    if kind is None or isinstance(kind, Damage):
        return kind
    if not full and has_valid_end(source, kind):
        return None
    try:
        yield from _whole(source, kind, tar=expects_tar_inside(name))
    except UnsoundError as error:
        return error.damage
    except TarError as error:
        return Damage(Reason.TRUNCATED if error.truncated else Reason.DAMAGED, str(error))
    return None


def _whole(source: BoundedFile, kind: ArchiveKind, *, tar: bool) -> Generator[None, None, None]:
    match kind:
        case ArchiveKind.TAR:
            yield from _walk_tar(source)
        case ArchiveKind.ZIP:
            yield from walk_zip(source)
        case ArchiveKind.ZSTD:
            yield from walk_zstd(source)
        case _:
            output = DecompressedOutput(source.size, tar=tar)
            yield from expand(source, kind, output)
            output.finish()


def _walk_tar(source: BoundedFile) -> Generator[None, None, None]:
    walk, at = TarWalk(), 0
    while not walk.ended and (data := source.read(at, CHUNK)):
        walk.feed(data)
        at += len(data)
        yield
    walk.finish()
