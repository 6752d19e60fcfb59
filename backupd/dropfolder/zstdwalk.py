"""Walking through zstd's frames by the sizes of their blocks (RFC 8878); Python can't decompress it."""

from __future__ import annotations

from collections.abc import Generator

from backupd.core.archive_formats import ArchiveKind, UnsoundError, magics
from backupd.core.policy import Reason
from backupd.dropfolder.decompress import BoundedFile

_CONTENT_SIZES = (0, 2, 4, 8)
_DICTIONARY_SIZES = (0, 1, 2, 4)
_RLE, _RESERVED = 1, 3
_BLOCKS_A_STEP = 64


def walk_zstd(source: BoundedFile) -> Generator[None, None, None]:
    """Follow all frames to the last one's end; raises UnsoundError if the file ends before that."""
    at = held = frames = 0
    while at < source.size:
        frames += 1
        if frames % _BLOCKS_A_STEP == 0:
            yield
        magic = source.read(at, 4)
        if magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50:
            at += 8 + int.from_bytes(source.read(at + 4, 4), "little")
        elif magic in magics(ArchiveKind.ZSTD):
            at, data = yield from _frame(source, at + 4)
            held += data
        else:
            break  # behind the frames anything may follow
        if at > source.size:
            raise UnsoundError(Reason.TRUNCATED, "ends in the middle of its zstd data")
    if not held:
        raise UnsoundError(Reason.TRUNCATED, "holds nothing")


def _frame(source: BoundedFile, at: int) -> Generator[None, None, tuple[int, int]]:
    """Return where a frame ends, which may be behind the end of the file, and the bytes of its blocks."""
    descriptor = source.read(at, 1)
    if not descriptor:
        return source.size + 1, 0
    flags = descriptor[0]
    single = flags >> 5 & 1
    if flags & 8:
        raise UnsoundError(Reason.DAMAGED, "its zstd header has a bit set that is reserved")
    content = _CONTENT_SIZES[flags >> 6] or single
    at += 1 + (not single) + _DICTIONARY_SIZES[flags & 3] + content
    held = blocks = 0
    while True:
        header = source.read(at, 3) if at < source.size else b""
        if len(header) < 3:
            return source.size + 1, held
        block = int.from_bytes(header, "little")
        kind, size = block >> 1 & 3, block >> 3
        if kind == _RESERVED:
            raise UnsoundError(Reason.DAMAGED, f"its zstd data has no valid block at byte {at}")
        at += 3 + (1 if kind == _RLE else size)
        held += size
        blocks += 1
        if block & 1:
            return at + 4 * (flags >> 2 & 1), held
        if blocks % _BLOCKS_A_STEP == 0:
            yield
