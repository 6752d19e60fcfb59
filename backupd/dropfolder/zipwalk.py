"""Checking the entries of a zip by its central directory; APPNOTE.TXT, sections 4.3 and 4.4."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from backupd.core.archive_formats import EMPTY, Note, UnsoundError
from backupd.core.policy import Reason
from backupd.dropfolder.decompress import (
    BoundedFile,
    UninspectableError,
    ZlibDecoder,
    decompress,
    max_output_bytes,
)

_END_RECORD, _ENTRY, _LOCAL_HEADER = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_END_RECORD_64, _LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"
_SPLIT_MARKERS = (b"PK\x07\x08", b"PK00")
_END_RECORD_BYTES, _ENTRY_BYTES, _LOCAL_HEADER_BYTES = 22, 46, 30
_END_RECORD_64_BYTES, _LOCATOR_64_BYTES = 56, 20
_MAX_COMMENT_BYTES = 0xFFFF
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class _Directory:
    """The central directory: its place in the file, and by how much the offsets in it are too small.

    `shift` is 0, or 4 if the offsets do not count the marker of a split zip at the start of the file.
    """

    start: int
    end: int
    entries: int
    shift: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the central directory; `offset` is the position of its local header in the file."""

    flags: int
    method: int
    crc: int
    compressed_size: int
    size: int
    offset: int


def check_zip(source: BoundedFile) -> Note | None:
    """Read every entry of a zip and compare its size and CRC with the central directory; note an empty zip.

    Of entries that are encrypted or compressed with another method than deflate, only the place in the file
    is checked. Raises UnsoundError for a damaged or incomplete zip, UninspectableError, OSError and
    StoppedError.
    """
    directory = _find_directory(source)
    if not directory.entries:
        return Note(EMPTY, "the zip contains no files")
    offset, remaining = directory.start, max_output_bytes(source.size)
    for number in range(1, directory.entries + 1):
        head = source.read(offset, _ENTRY_BYTES)
        if len(head) < _ENTRY_BYTES or head[:4] != _ENTRY or offset >= directory.end:
            raise UnsoundError(
                Reason.DAMAGED,
                f"entry {number} of {directory.entries} is missing from the zip's central directory",
            )
        name, extra, comment = struct.unpack_from("<HHH", head, 28)
        entry = _parse_entry(head, source.read(offset + _ENTRY_BYTES + name, extra), directory.shift)
        remaining = _check_entry(source, entry, number, remaining)
        offset += _ENTRY_BYTES + name + extra + comment
    return None


def has_central_directory(source: BoundedFile) -> bool:
    """Return whether a zip ends with a central directory that has an entry."""
    try:
        directory = _find_directory(source)
    except UnsoundError:
        return False
    return directory.entries > 0 and source.read(directory.start, 4) == _ENTRY


def _find_directory(source: BoundedFile) -> _Directory:
    tail_start = max(source.size - _END_RECORD_BYTES - _MAX_COMMENT_BYTES, 0)
    tail = source.read(tail_start, _END_RECORD_BYTES + _MAX_COMMENT_BYTES)
    found = tail.rfind(_END_RECORD)
    while found >= 0 and not _is_complete_end_record(tail, found):
        found = tail.rfind(_END_RECORD, 0, found)
    if found < 0:
        raise UnsoundError(Reason.TRUNCATED, "the zip ends without a central directory")
    entries, size, offset = struct.unpack_from("<HII", tail, found + 10)
    end = tail_start + found
    locator = source.read(max(end - _LOCATOR_64_BYTES, 0), _LOCATOR_64_BYTES)
    if locator[:4] == _LOCATOR_64:  # some writers add it to small archives
        end -= _LOCATOR_64_BYTES + _END_RECORD_64_BYTES
        record = source.read(max(end, 0), _END_RECORD_64_BYTES)
        if record[:4] != _END_RECORD_64:
            end = struct.unpack_from("<Q", locator, 8)[0]
            record = source.read(min(end, source.size), _END_RECORD_64_BYTES)
        if len(record) < _END_RECORD_64_BYTES or record[:4] != _END_RECORD_64:
            raise UnsoundError(Reason.DAMAGED, "the zip64 directory is not at its stated position")
        entries, size, offset = struct.unpack_from("<QQQ", record, 32)
    shift = end - size - offset
    if shift and not (shift == 4 and source.read(0, 4) in _SPLIT_MARKERS):
        # a zip that was cut off can end with the whole directory of a zip inside it
        raise UnsoundError(
            Reason.DAMAGED,
            "the zip's central directory is not at its stated position, or belongs to a zip inside it",
        )
    return _Directory(end - size, end, entries, shift)


def _is_complete_end_record(tail: bytes, start: int) -> bool:
    """Return whether an end record with its comment fits into the file."""
    end = start + _END_RECORD_BYTES
    return len(tail) >= end and len(tail) >= end + int(struct.unpack_from("<H", tail, start + 20)[0])


def _parse_entry(head: bytes, extra: bytes, shift: int) -> _Entry:
    flags, method = struct.unpack_from("<HH", head, 8)
    crc, compressed_size, size = struct.unpack_from("<III", head, 16)
    offset = struct.unpack_from("<I", head, 42)[0]
    zip64 = _zip64_fields(extra)
    if size == 0xFFFFFFFF and zip64:
        size = zip64.pop(0)
    if compressed_size == 0xFFFFFFFF and zip64:
        compressed_size = zip64.pop(0)
    if offset == 0xFFFFFFFF and zip64:
        offset = zip64.pop(0)
    return _Entry(flags, method, crc, compressed_size, size, offset + shift)


def _zip64_fields(extra: bytes) -> list[int]:
    offset = 0
    while offset + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, offset)
        if kind == 1:
            field = extra[offset + 4 : offset + 4 + size]
            return [int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field) - 7, 8)]
        offset += 4 + size
    return []


def _check_entry(source: BoundedFile, entry: _Entry, number: int, remaining: int) -> int:
    """Check one entry; return how many bytes the entries after it may expand to, all together."""
    head = source.read(min(entry.offset, source.size), _LOCAL_HEADER_BYTES)
    if len(head) < _LOCAL_HEADER_BYTES or head[:4] != _LOCAL_HEADER:
        raise UnsoundError(Reason.DAMAGED, f"entry {number} of the zip is not at its stated position")
    name, extra = struct.unpack_from("<HH", head, 26)
    offset = entry.offset + _LOCAL_HEADER_BYTES + name + extra
    end = offset + entry.compressed_size
    if end > source.size:
        raise UnsoundError(Reason.DAMAGED, f"entry {number} of the zip extends beyond the end of the file")
    if entry.flags & _ENCRYPTED or entry.method not in (_STORED, _DEFLATED):
        return remaining
    crc = total = 0
    decoder = ZlibDecoder(-15) if entry.method == _DEFLATED else None
    chunks = source.chunks(offset, end)
    for piece in chunks if decoder is None else decompress(source, decoder, chunks, "zip"):
        crc, total = zlib.crc32(piece, crc), total + len(piece)
        if total > remaining:
            limit = max_output_bytes(source.size) >> 20
            raise UninspectableError(f"the archive expands to more than {limit} MiB, at entry {number}")
    if crc != entry.crc or total != entry.size or (decoder is not None and not decoder.eof):
        raise UnsoundError(
            Reason.DAMAGED, f"entry {number} of the zip does not match the CRC and size in its directory"
        )
    return remaining - total
