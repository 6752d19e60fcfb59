"""Walking through a zip by its central directory, entry by entry; APPNOTE.TXT, sections 4.3 and 4.4."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Generator
from dataclasses import dataclass

from backupd.core.archive_formats import UnsoundError
from backupd.core.policy import Reason
from backupd.dropfolder.decompress import CHUNK, BoundedFile, Inflate, LimitReachedError, push

_END, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_LONGEST_COMMENT = 0xFFFF
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1
_FREE = 256 << 20
_RATIO = 200


@dataclass(frozen=True, slots=True)
class _Directory:
    at: int
    end: int
    entries: int
    shift: int


@dataclass(frozen=True, slots=True)
class _Entry:
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    at: int


def has_central_directory(source: BoundedFile) -> bool:
    """Tell whether a zip ends with a central directory of one entry and more."""
    try:
        directory = _directory(source)
    except UnsoundError:
        return False
    return directory.entries > 0 and source.read(directory.at, 4) == _ENTRY


def walk_zip(source: BoundedFile) -> Generator[None, None, None]:
    """Read every entry to its end and check its CRC; encrypted ones and rare methods by their place alone."""
    directory = _directory(source)
    if not directory.entries:
        raise UnsoundError(Reason.TRUNCATED, "holds no files")
    at, left = directory.at, _FREE + _RATIO * source.size
    for number in range(1, directory.entries + 1):
        head = source.read(at, 46)
        if len(head) < 46 or head[:4] != _ENTRY or at >= directory.end:
            raise UnsoundError(
                Reason.DAMAGED, f"entry {number} of {directory.entries} is not in its directory"
            )
        name, extra, comment = struct.unpack_from("<HHH", head, 28)
        entry = _entry(head, source.read(at + 46 + name, extra), directory.shift)
        left = yield from _check(source, entry, f"entry {number}", left)
        at += 46 + name + extra + comment


def _directory(source: BoundedFile) -> _Directory:
    start = max(source.size - 22 - _LONGEST_COMMENT, 0)
    tail = source.read(start, 22 + _LONGEST_COMMENT)
    found = tail.rfind(_END)
    while found >= 0 and (
        len(tail) < found + 22 or len(tail) < found + 22 + struct.unpack_from("<H", tail, found + 20)[0]
    ):
        found = tail.rfind(_END, 0, found)
    if found < 0:
        raise UnsoundError(Reason.TRUNCATED, "ends without a zip's central directory")
    entries, size, offset = struct.unpack_from("<HII", tail, found + 10)
    end = start + found
    if entries == 0xFFFF or 0xFFFFFFFF in (size, offset):
        locator = source.read(max(end - 20, 0), 20)
        if locator[:4] == _LOCATOR64:
            end -= 76
            record = source.read(max(end, 0), 56)
            if record[:4] != _END64:
                end = struct.unpack_from("<Q", locator, 8)[0]
                record = source.read(min(end, source.size), 56)
            if len(record) < 56 or record[:4] != _END64:
                raise UnsoundError(Reason.DAMAGED, "its zip64 directory is not where it should be")
            entries, size, offset = struct.unpack_from("<QQQ", record, 32)
    shift = end - size - offset
    if shift < 0:
        raise UnsoundError(Reason.DAMAGED, "its central directory is not where it should be")
    return _Directory(end - size, end, entries, shift)


def _entry(head: bytes, extra: bytes, shift: int) -> _Entry:
    flags, method = struct.unpack_from("<HH", head, 8)
    crc, packed, size = struct.unpack_from("<III", head, 16)
    at = struct.unpack_from("<I", head, 42)[0]
    wide = _zip64(extra)
    if size == 0xFFFFFFFF and wide:
        size = wide.pop(0)
    if packed == 0xFFFFFFFF and wide:
        packed = wide.pop(0)
    if at == 0xFFFFFFFF and wide:
        at = wide.pop(0)
    return _Entry(flags, method, crc, packed, size, at + shift)


def _zip64(extra: bytes) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + size]
            return [int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field) - 7, 8)]
        at += 4 + size
    return []


def _check(source: BoundedFile, entry: _Entry, what: str, left: int) -> Generator[None, None, int]:
    """Read one entry; return how many bytes may still come out of the others."""
    head = source.read(min(entry.at, source.size), 30)
    if len(head) < 30 or head[:4] != _LOCAL:
        raise UnsoundError(Reason.DAMAGED, f"{what} is not where its directory says")
    name, extra = struct.unpack_from("<HH", head, 26)
    at = entry.at + 30 + name + extra
    end = at + entry.packed
    if end > source.size:
        raise UnsoundError(Reason.DAMAGED, f"{what} ends behind the end of the file")
    yield
    if entry.flags & _ENCRYPTED or entry.method not in (_STORED, _DEFLATED):
        return left
    crc = total = 0
    inflate = Inflate(-15) if entry.method == _DEFLATED else None
    while at < end or (inflate is not None and not inflate.hungry and not inflate.eof):
        data = source.read(at, min(CHUNK, end - at)) if inflate is None or inflate.hungry else b""
        at += len(data)
        out = data if inflate is None else push(inflate, data, "zip")
        crc, total = zlib.crc32(out, crc), total + len(out)
        if total > left:
            raise LimitReachedError(f"{total} bytes and more came out of {what}")
        yield
        if inflate is not None and inflate.eof:
            break
        if inflate is None and not data:
            break
    if crc != entry.crc or total != entry.size or (inflate is not None and not inflate.eof):
        raise UnsoundError(Reason.DAMAGED, f"{what} does not have the content that its directory states")
    return left - total
