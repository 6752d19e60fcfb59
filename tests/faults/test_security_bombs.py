"""Archives that are made to be costly to inspect: memory and work are bounded."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.core.archive_formats import Damage, Note
from backupd.dropfolder.decompress import UninspectableError
from backupd.dropfolder.inspect import inspect

pytestmark = pytest.mark.long

MIB = 1 << 20


def tar_header(kind: bytes = b"0", size: bytes = b"00000000000\0") -> bytes:
    header = bytearray(512)
    header[:1], header[100:108] = b"a", b"0000644\0"
    header[124:136], header[156:157], header[257:265] = size, kind, b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(record: bytes) -> bytes:
    padded = record + bytes(-len(record) % 512)
    return tar_header(b"x", b"%011o\0" % len(record)) + padded + tar_header() + bytes(1024)


def overlapping(entries: int, size: int = MIB) -> bytes:
    """Return a zip file with entries that all share the same bytes."""
    squeeze, crc = zlib.compressobj(9, zlib.DEFLATED, -15), zlib.crc32(bytes(size))
    data = squeeze.compress(bytes(size)) + squeeze.flush()
    local = b"PK\3\4" + struct.pack("<5H3I2H", 20, 0, 8, 0, 0, crc, len(data), size, 1, 0) + b"a" + data
    entry = struct.pack("<6H3I5H2I", 20, 20, 0, 8, 0, 0, crc, len(data), size, 1, 0, 0, 0, 0, 0, 0)
    directory = (b"PK\1\2" + entry + b"a") * entries
    end = struct.pack("<4H2IH", 0, 0, entries, entries, len(directory), len(local), 0)
    return local + directory + b"PK\5\6" + end


def nested() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as outer:
        for number in range(16):
            outer.writestr(f"{number}.zip", overlapping(60_000, 100))
    return out.getvalue()


def zip64_without_bounds() -> bytes:
    record = struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 2**63, 2**63, 2**64 - 1, 0)
    end = struct.pack("<4H2IH", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    locator = struct.pack("<IQI", 0, 104, 1)
    return b"PK\3\4" + bytes(100) + b"PK\6\6" + record + b"PK\6\7" + locator + b"PK\5\6" + end


ZSTD = b"\x28\xb5\x2f\xfd\x00"
"""The beginning of a zstd frame; the size of its window follows."""
BOMBS: dict[str, Callable[[], bytes]] = {
    "negative.tar": lambda: tar_header(size=b"\xff" * 12) + bytes(1024),
    "endless.tar": lambda: tar_header(size=b"\x80" + b"\xff" * 11) + bytes(1024),
    "large-pax.tar": lambda: tar_header(b"x", b"\x80" + bytes(6) + b"\0\xff\xff\xff\xff") + bytes(1024),
    "pax-digits.tar": lambda: pax(b"20000 size=" + b"9" * 19_000 + b"\n"),
    "pax-negative.tar": lambda: pax(b"11 size=-5\n"),
    "members.tar": lambda: tar_header() * 20_000 + bytes(1024),
    "links.tar": lambda: tar_header(b"2", b"77777777777\0") * 1000 + bytes(1024),
    "members.tar.gz": lambda: gzip.compress(tar_header() * 50_000 + bytes(1024)),
    "twice.gz": lambda: gzip.compress(gzip.compress(bytes(64 * MIB))),
    "members.gz": lambda: gzip.compress(b"") * 20_000,
    "members.bz2": lambda: bz2.compress(b"") * 20_000,
    "members.xz": lambda: lzma.compress(b"") * 10_000,
    "zeros-behind.gz": lambda: gzip.compress(b"abc") + bytes(32 * MIB),
    "overlapping.zip": lambda: overlapping(0xFFFE),
    "nested.zip": nested,
    "ends.zip": lambda: b"PK\3\4" + b"PK\5\6" * 16_000,
    "zip64.zip": zip64_without_bounds,
    "window-of-terabytes.zst": lambda: ZSTD + b"\xf8" + b"\x09\0\0x",
    "run-lengths.zst": lambda: ZSTD + b"\x58" + b"\xfa\xff\x0f\0" * 50_000 + b"\x01\0\0",
    "members.zst": lambda: (ZSTD + b"\x58\x01\0\0") * 20_000,
    "skipped.zst": lambda: ZSTD + b"\x58\x09\0\0x" + b"\x50\x2a\x4d\x18\xff\xff\xff\xff" * 1000,
}


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
@pytest.mark.parametrize("name", BOMBS)
def test_no_archive_is_costly_to_inspect(tmp_path: Path, name: str, full: bool) -> None:
    path = tmp_path / name
    path.write_bytes(BOMBS[name]())
    size = path.stat().st_size
    chunks = 0

    def should_stop() -> bool:
        nonlocal chunks
        chunks += 1
        return False

    found: object
    fd = os.open(path, os.O_RDONLY)
    tracemalloc.start()
    try:
        found = inspect(fd, size, name.encode(), full=full, should_stop=should_stop)
    except UninspectableError as error:
        found = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        os.close(fd)
    assert found is None or isinstance(found, Damage | Note | UninspectableError)
    assert peak < 8 * MIB
    assert chunks < 140_000  # each of at most 1 MiB
    assert len(str(found)) < 300
