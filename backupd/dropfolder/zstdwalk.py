"""Following the frames of a zstd file by the sizes of their blocks (RFC 8878), without decompressing it."""

from __future__ import annotations

from collections.abc import Generator

from backupd.core.archive_formats import ArchiveKind, UnsoundError, magics
from backupd.core.policy import Reason
from backupd.dropfolder.decompress import BoundedFile

_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)
_RLE_BLOCK, _RESERVED_BLOCK = 1, 3
_BLOCKS_PER_STEP = 64


def walk_zstd(source: BoundedFile) -> Generator[None, None, None]:
    """Follow all frames of a file; bytes after the last one are ignored.

    Raises UnsoundError if the file ends within a frame, has an invalid one or no data, and OSError.
    """
    offset = data_bytes = frames = 0
    while offset < source.size:
        frames += 1
        if frames % _BLOCKS_PER_STEP == 0:
            yield
        magic = source.read(offset, 4)
        if magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50:  # a skippable frame
            offset += 8 + int.from_bytes(source.read(offset + 4, 4), "little")
        elif magic in magics(ArchiveKind.ZSTD):
            offset, block_bytes = yield from _walk_frame(source, offset + 4)
            data_bytes += block_bytes
        else:
            break
        if offset > source.size:
            raise UnsoundError(Reason.TRUNCATED, "the archive ends in the middle of its zstd data")
    if not data_bytes:
        raise UnsoundError(Reason.TRUNCATED, "the archive contains no data")


def _walk_frame(source: BoundedFile, offset: int) -> Generator[None, None, tuple[int, int]]:
    """Return the end of a frame and the bytes in its blocks.

    The end is beyond that of the file if the frame is incomplete.
    """
    descriptor = source.read(offset, 1)
    if not descriptor:
        return source.size + 1, 0
    flags = descriptor[0]
    is_single_segment = flags >> 5 & 1
    if flags & 8:
        raise UnsoundError(Reason.DAMAGED, "the zstd header has a reserved bit set")
    content_size = _CONTENT_SIZE_BYTES[flags >> 6] or is_single_segment
    offset += 1 + (not is_single_segment) + _DICTIONARY_ID_BYTES[flags & 3] + content_size
    block_bytes = blocks = 0
    while True:
        header = source.read(offset, 3) if offset < source.size else b""
        if len(header) < 3:
            return source.size + 1, block_bytes
        block = int.from_bytes(header, "little")
        kind, size = block >> 1 & 3, block >> 3
        if kind == _RESERVED_BLOCK:
            raise UnsoundError(Reason.DAMAGED, f"the zstd data has no valid block at byte {offset}")
        offset += 3 + (1 if kind == _RLE_BLOCK else size)
        block_bytes += size
        blocks += 1
        if block & 1:
            return offset + 4 * (flags >> 2 & 1), block_bytes
        if blocks % _BLOCKS_PER_STEP == 0:
            yield
