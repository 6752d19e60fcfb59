"""What an archive should look like: its kind by content and by name, and what can be wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from backupd.core.policy import Reason

BLOCK = 512

HEAD = BLOCK
"""Bytes from the beginning of a file that tell its kind."""


class ArchiveKind(StrEnum):
    """A format that is known well enough to tell whether a file of it is whole."""

    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    ZSTD = "zstd"
    ZIP = "zip"
    TAR = "tar"


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with an archive, as the policy calls it and in words."""

    reason: Reason
    error: str


class UnsoundError(Exception):
    """An archive is not whole; only for within an inspection, the outcome of which is a `Finding`."""

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(error)
        self.finding = Damage(reason, error)


_BZIP2_BLOCKS = (bytes.fromhex("314159265359"), bytes.fromhex("177245385090"))
_MAGIC = {
    ArchiveKind.GZIP: (b"\x1f\x8b\x08",),
    ArchiveKind.BZIP2: tuple(b"BZh%d" % level + block for level in range(1, 10) for block in _BZIP2_BLOCKS),
    ArchiveKind.XZ: (b"\xfd7zXZ\0",),
    ArchiveKind.ZSTD: (b"\x28\xb5\x2f\xfd",),
    ArchiveKind.ZIP: (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08PK\x03\x04", b"PK00PK\x03\x04"),
}

_BY_ENDING = {
    b".gz": ArchiveKind.GZIP,
    b".tgz": ArchiveKind.GZIP,
    b".bz2": ArchiveKind.BZIP2,
    b".tbz": ArchiveKind.BZIP2,
    b".tbz2": ArchiveKind.BZIP2,
    b".xz": ArchiveKind.XZ,
    b".txz": ArchiveKind.XZ,
    b".zst": ArchiveKind.ZSTD,
    b".tzst": ArchiveKind.ZSTD,
    b".zip": ArchiveKind.ZIP,
    b".tar": ArchiveKind.TAR,
}
_TAR_WITHIN = (b".tar.gz", b".tar.bz2", b".tar.xz", b".tgz", b".tbz", b".tbz2", b".txz")


def magics(kind: ArchiveKind) -> tuple[bytes, ...]:
    """Return how files of a kind begin; nothing for tar, whose first block has a checksum instead."""
    return _MAGIC.get(kind, ())


def kind_from_name(name: bytes) -> ArchiveKind | None:
    """Return the kind that a name promises."""
    name = name.lower()
    return next((kind for ending, kind in _BY_ENDING.items() if name.endswith(ending)), None)


def expects_tar_inside(name: bytes) -> bool:
    """Tell whether a name promises a tar below a compression."""
    return name.lower().endswith(_TAR_WITHIN)


def kind_from_content(head: bytes) -> ArchiveKind | None:
    """Return the kind that the first `HEAD` bytes are of."""
    for kind, beginnings in _MAGIC.items():
        if head.startswith(beginnings):
            return kind
    return ArchiveKind.TAR if is_tar_header(head[:BLOCK]) else None


def kind_of(name: bytes, head: bytes) -> ArchiveKind | Damage | None:
    """Return what to inspect a file as, or what is wrong with its beginning; None if it is of no known kind.

    The content decides. The name only makes a content suspicious that is of no known kind.
    """
    promised, found = kind_from_name(name), kind_from_content(head)
    if found is not None or promised is None:
        return found
    if not head.strip(b"\0"):
        return Damage(Reason.TRUNCATED, "holds nothing" + (" but zeros" if head else ""))
    if len(head) < HEAD and (
        promised is ArchiveKind.TAR or any(magic.startswith(head) for magic in magics(promised))
    ):
        return Damage(Reason.TRUNCATED, f"ends after {len(head)} bytes, within the beginning of a {promised}")
    return Damage(Reason.DAMAGED, f"named like a {promised}, but does not begin like one")


_ZEROS = bytes(BLOCK)
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, directories, FIFOs
_MOST_PAX = 1 << 20
_PAX_SIZE = re.compile(rb"(?:^|\n)\d+ size=(\d{1,20})\n")


def _number(field: bytes) -> int | None:
    """Return a numeric field: octal digits, or GNU's base 256."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if digits.strip(b"01234567"):  # int() would take a sign, and the walk go backwards
        return None
    return int(digits or b"0", 8)


def is_tar_header(block: bytes) -> bool:
    """Tell whether a block is a header: its checksum is that of its bytes, summed with or without sign."""
    if len(block) < BLOCK or block == _ZEROS or not block[148:156].strip(b" \0"):
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    signed = unsigned - 256 * sum(byte > 127 for byte in rest)
    return _number(block[148:156]) in (unsigned, signed)


class TarError(Exception):
    """What streamed by is no sound tar; `cut` if it only ends too early."""

    def __init__(self, error: str, *, cut: bool) -> None:
        super().__init__(error)
        self.cut = cut


class TarWalk:
    """Is fed a tar's bytes in pieces of any size; holds no more than a pax header of them."""

    def __init__(self) -> None:
        self.ended = False
        self.members = 0
        self._at = 0
        self._block = b""
        self._skip = 0
        self._pax: bytearray | None = None
        self._pax_left = 0
        self._size: int | None = None
        self._extended = False
        self._unsure = 0
        self._after_extension = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises TarError where they are no tar."""
        at = 0
        while at < len(data) and not self.ended:
            if self._skip:
                step = min(self._skip, len(data) - at)
                if self._pax is not None:
                    self._pax += data[at : at + min(step, self._pax_left)]
                    self._pax_left -= min(step, self._pax_left)
                self._skip -= step
                if self._pax is not None and not self._skip:
                    self._take_pax(bytes(self._pax))
            else:
                step = min(BLOCK - len(self._block), len(data) - at)
                self._block += data[at : at + step]
                if len(self._block) == BLOCK:
                    block, self._block = self._block, b""
                    self._take(block)
            at += step
            self._at += step

    def finish(self) -> None:
        """Raise TarError unless the end was seen, and something before it."""
        if not self.ended:
            raise TarError(f"the tar ends in the middle, after {self._at} bytes", cut=True)
        if not self.members:
            raise TarError("the tar holds nothing", cut=True)

    def _take(self, block: bytes) -> None:
        if self._extended:
            self._extended = bool(block[504])
            if not self._extended:
                self._skip = self._after_extension
            return
        if block == _ZEROS:
            self.ended = True
            return
        if not is_tar_header(block):
            if not self._unsure:
                raise TarError(f"the tar has no valid header at byte {self._at}", cut=False)
            self._skip, self._unsure = self._unsure - BLOCK, 0
            return
        self._header(block)

    def _header(self, block: bytes) -> None:
        kind, size = block[156], _number(block[124:136])
        if size is None:
            raise TarError(f"the tar's header at byte {self._at} has no size", cut=False)
        self._unsure = 0
        if kind in b"xg":
            self._skip = _padded(size)
            if kind == ord("x") and 0 < size <= _MOST_PAX:
                self._pax, self._pax_left = bytearray(), size
            return
        if kind not in b"LK":
            self.members += 1
            size, self._size = (size if self._size is None else self._size), None
        if kind in _WITHOUT_DATA:
            self._unsure = _padded(size)  # some writers give the data of a link all the same
        elif kind == ord("S") and block[482]:
            self._extended, self._after_extension = True, _padded(size)
        else:
            self._skip = _padded(size)

    def _take_pax(self, records: bytes) -> None:
        self._pax = None
        found = _PAX_SIZE.search(records)
        if found is not None:
            self._size = int(found[1])


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
