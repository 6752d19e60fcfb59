"""Checking in small steps whether an archive is whole, without unpacking it.

An inspection is a generator: each step reads a little, and the caller decides how many steps to run. Nothing
is written, memory is bounded, and archives inside an archive are not inspected.
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
from backupd.dropfolder.decompress import CHUNK, BoundedFile, DecompressedOutput, decompress_streams
from backupd.dropfolder.zipwalk import has_central_directory, walk_zip
from backupd.dropfolder.zstdwalk import walk_zstd

InspectionSteps = Generator[None, None, Damage | None]

_BZIP2_END = 0x177245385090
_MIN_GZIP_BYTES = 18
_TAIL_BYTES = 4096


def inspect(fd: int, size: int, name: bytes, *, full: bool) -> InspectionSteps:
    """Return the damage of an archive that is open for reading, None if none was found.

    Without `full`, only the first and the last bytes are checked; if these are not right, the archive is read
    in full, as only that is certain. Raises LimitReachedError if the inspection was given up, and OSError if
    the archive can't be read.
    """
    source = BoundedFile(fd, size)
    kind = kind_of(name, source.read(0, HEAD))
    if kind is None or isinstance(kind, Damage):
        return kind
    if not full and has_valid_end(source, kind):
        return None
    try:
        yield from _read_all(source, kind, tar=expects_tar_inside(name))
    except UnsoundError as error:
        return error.damage
    except TarError as error:
        return Damage(Reason.TRUNCATED if error.truncated else Reason.DAMAGED, str(error))
    return None


def has_valid_end(source: BoundedFile, kind: ArchiveKind) -> bool:
    """Return whether the last bytes of a file are those of a complete archive of a kind.

    The end of a gzip file can't be checked without decompressing it; only its length is.
    """
    tail = source.read(max(source.size - _TAIL_BYTES, 0), _TAIL_BYTES)
    match kind:
        case ArchiveKind.GZIP:
            return source.size > _MIN_GZIP_BYTES
        case ArchiveKind.BZIP2:
            return _has_bzip2_end(tail)
        case ArchiveKind.XZ:
            return _has_xz_footer(tail)
        case ArchiveKind.TAR:
            return source.size > BLOCK and tail.endswith(bytes(BLOCK))
        case ArchiveKind.ZIP:
            return has_central_directory(source)
        case _:
            return False  # following the frames of a zstd file to its end is fast enough


def _has_bzip2_end(tail: bytes) -> bool:
    """Return whether a file ends with the end mark: 48 bits, 32 bits of checksum, 0 to 7 bits of padding."""
    bits = int.from_bytes(tail[-11:], "big") >> 32
    return len(tail) > 14 and any(bits >> pad & (1 << 48) - 1 == _BZIP2_END for pad in range(8))


def _has_xz_footer(tail: bytes) -> bool:
    """Return whether a file ends with a valid stream footer; The .xz File Format, section 2.1.2."""
    footer = tail.rstrip(b"\0")[-12:]
    return (
        len(footer) == 12
        and footer[10:] == b"YZ"
        and int.from_bytes(footer[:4], "little") == zlib.crc32(footer[4:10])
    )


def _read_all(source: BoundedFile, kind: ArchiveKind, *, tar: bool) -> Generator[None, None, None]:
    match kind:
        case ArchiveKind.TAR:
            yield from _walk_tar(source)
        case ArchiveKind.ZIP:
            yield from walk_zip(source)
        case ArchiveKind.ZSTD:
            yield from walk_zstd(source)
        case _:
            output = DecompressedOutput(source.size, tar=tar)
            yield from decompress_streams(source, kind, output)
            output.finish()


def _walk_tar(source: BoundedFile) -> Generator[None, None, None]:
    walk, offset = TarWalk(), 0
    while not walk.ended and (data := source.read(offset, CHUNK)):
        walk.feed(data)
        offset += len(data)
        yield
    walk.finish()
