"""Archive formats: how to recognize one by content and by name, and how to follow the structure of a tar."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from backupd.core.policy import Reason

BLOCK = 512
"""Bytes in a block of a tar."""

HEAD = 20 * BLOCK
"""Bytes at the start of a file from which its format is recognized; an empty tar has as many."""


class ArchiveKind(StrEnum):
    """An archive format that backupd can check for completeness."""

    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    ZSTD = "zstd"
    ZIP = "zip"
    TAR = "tar"


@dataclass(frozen=True, slots=True)
class Damage:
    """A defect of an archive: its reason in the failure policy, and a description for the log."""

    reason: Reason
    error: str


@dataclass(frozen=True, slots=True)
class Note:
    """A peculiarity of an archive that is no damage: its reason, one word, and a description for the log."""

    reason: str
    text: str


MISNAMED, EMPTY, NO_TAR_END = "misnamed", "empty", "no_tar_end"
"""The reasons of notes."""


class UnsoundError(Exception):
    """An archive is incomplete or damaged.

    It is raised and caught within one inspection, which returns its `damage` as the result.
    """

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(error)
        self.damage = Damage(reason, error)


_BZIP2_BLOCKS = (bytes.fromhex("314159265359"), bytes.fromhex("177245385090"))
_MAGIC = {
    ArchiveKind.GZIP: (b"\x1f\x8b\x08",),
    ArchiveKind.BZIP2: tuple(b"BZh%d" % level + block for level in range(1, 10) for block in _BZIP2_BLOCKS),
    ArchiveKind.XZ: (b"\xfd7zXZ\0",),
    ArchiveKind.ZSTD: (b"\x28\xb5\x2f\xfd",),
    ArchiveKind.ZIP: (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08PK\x03\x04", b"PK00PK\x03\x04"),
}

_ZSTD_SKIPPABLE = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))
"""The magic numbers of zstd's skippable frames. LZ4 has the same, so that alone they identify no format."""

_KIND_BY_SUFFIX = {
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
_COMPRESSED_TAR_SUFFIXES = tuple(b".tar.gz .tgz .tar.bz2 .tbz .tbz2 .tar.xz .txz .tar.zst .tzst".split())


def magics(kind: ArchiveKind) -> tuple[bytes, ...]:
    """Return the byte sequences that a file of this kind, or one of its streams, can start with.

    Empty for a tar: its first block is recognized by its checksum, see `is_tar_header`.
    """
    return _MAGIC.get(kind, ()) + (_ZSTD_SKIPPABLE if kind is ArchiveKind.ZSTD else ())


def is_cut_magic(data: bytes, kind: ArchiveKind) -> bool:
    """Return whether data is the beginning of a magic number of this kind, but not all of it."""
    return any(0 < len(data) < len(magic) and magic.startswith(data) for magic in magics(kind))


def is_bgzf(head: bytes) -> bool:
    """Return whether a gzip file is one of bgzip, which ends with an empty member; SAM/BAM, section 4.1."""
    return head[:4] == b"\x1f\x8b\x08\x04" and head[12:16] == b"BC\2\0"


def kind_from_name(name: bytes) -> ArchiveKind | None:
    """Return the kind that the suffix of a file name indicates, None if it indicates none."""
    name = name.lower()
    return next((kind for suffix, kind in _KIND_BY_SUFFIX.items() if name.endswith(suffix)), None)


def expects_tar_inside(name: bytes) -> bool:
    """Return whether a file name is that of a compressed tar."""
    return name.lower().endswith(_COMPRESSED_TAR_SUFFIXES)


def kind_from_content(head: bytes) -> ArchiveKind | None:
    """Return the kind of a file that starts with the bytes `head`, None if it is not recognized."""
    for kind, beginnings in _MAGIC.items():
        if head.startswith(beginnings):
            return kind
    return ArchiveKind.TAR if is_tar_header(head[:BLOCK]) else None


def kind_of(name: bytes, head: bytes, size: int) -> ArchiveKind | Damage | Note | None:
    """Return the kind as which to inspect a file, or the result of the inspection: None if it is no archive.

    The content decides, whatever the name is. `head` are the first `HEAD` bytes of a file of `size` bytes. A
    file with the name of an archive and other content, such as an encrypted one, gets a note. Only zeros
    (the space was reserved and nothing written), or less than a header, are damage.
    """
    kind, expected = kind_from_content(head), kind_from_name(name)
    if kind is not None or expected is None:
        return kind
    if head.startswith(magics(expected)):
        return expected  # a zstd file that starts with a skippable frame
    if not head[:BLOCK].strip(b"\0"):
        if expected is ArchiveKind.TAR and BLOCK <= size <= HEAD and not head.strip(b"\0"):
            return Note(EMPTY, "the tar is empty")
        return Damage(
            Reason.TRUNCATED, "the archive starts with zeros only" if size else "the archive has no bytes"
        )
    if size < BLOCK and (expected is ArchiveKind.TAR or is_cut_magic(head, expected)):
        return Damage(Reason.TRUNCATED, f"the archive ends after {size} bytes, within its {expected} header")
    if expected is ArchiveKind.TAR and has_tar_magic(head):
        return Damage(Reason.DAMAGED, "the first header of the tar is damaged")
    return Note(MISNAMED, f"it has the name of a {expected} file, but does not start like one")


def misnamed_note(name: bytes, kind: ArchiveKind) -> Note | None:
    """Return the note of an archive of a kind with the name of another kind, None if the name is right."""
    expected = kind_from_name(name)
    if expected in (None, kind):
        return None
    return Note(MISNAMED, f"it has the name of a {expected} file, but is a {kind} file")


class TarError(Exception):
    """The bytes are not a valid tar; `truncated` if they are one that ends too early."""

    def __init__(self, error: str, *, truncated: bool) -> None:
        super().__init__(error)
        self.truncated = truncated


_ZEROS = bytes(BLOCK)
_ASCII = bytes(range(128))
_KINDS_WITHOUT_DATA = frozenset(b"123456")  # links, devices, directories, FIFOs
_MAX_PAX_BYTES = 1 << 20
_PAX_SIZE = re.compile(rb"(?:^|\n)\d+ size=(\d{1,20})\n")


class TarWalk:
    """Follows the headers of a tar that is fed in pieces of any size, and counts its members.

    It stores no more than one block and one pax header.
    """

    def __init__(self) -> None:
        self.ended = False
        self.members = 0
        self._offset = 0
        self._block = b""
        self._skip = 0
        self._pax: bytearray | None = None
        self._pax_left = 0
        self._pax_size: int | None = None
        self._in_sparse_map = False
        self._skip_after_map = 0
        self._optional_data = 0
        self._expects_member = False
        """Whether the last header belongs to a member that comes next."""

    def feed(self, data: bytes) -> None:
        """Read the next bytes of the tar; raise TarError where they are not valid."""
        at = 0
        while at < len(data) and not self.ended:
            if self._skip:
                step = min(self._skip, len(data) - at)
                if self._pax is not None:
                    self._pax += data[at : at + min(step, self._pax_left)]
                    self._pax_left -= min(step, self._pax_left)
                self._skip -= step
                if self._pax is not None and not self._skip:
                    self._parse_pax(bytes(self._pax))
            else:
                step = min(BLOCK - len(self._block), len(data) - at)
                self._block += data[at : at + step]
                if len(self._block) == BLOCK:
                    block, self._block = self._block, b""
                    self._parse_block(block)
            at += step
            self._offset += step

    def finish(self) -> Note | None:
        """Return a note if the tar is empty, or ends after a member, but without a block of zeros.

        GNU tar reads both. Raises TarError if it ends anywhere else.
        """
        if self.ended:
            return None if self.members else Note(EMPTY, "the tar is empty")
        if not self.members or self._skip or self._block or self._in_sparse_map or self._expects_member:
            raise TarError(f"the tar has no end, it stops after {self._offset} bytes", truncated=True)
        return Note(NO_TAR_END, "the tar ends after a file, without the closing blocks of zeros")

    def _parse_block(self, block: bytes) -> None:
        if self._in_sparse_map:
            self._in_sparse_map = bool(block[504])
            if not self._in_sparse_map:
                self._skip = self._skip_after_map
            return
        if block == _ZEROS:
            self.ended = True
            return
        if not is_tar_header(block):
            if not self._optional_data:
                raise TarError(f"the tar has no valid header at byte {self._offset}", truncated=False)
            self._skip, self._optional_data = self._optional_data - BLOCK, 0
            return
        self._parse_header(block)

    def _parse_header(self, block: bytes) -> None:
        kind, size = block[156], _number(block[124:136])
        if size is None:
            raise TarError(f"the tar header at byte {self._offset} has no valid size", truncated=False)
        self._optional_data = 0
        self._expects_member = kind in b"xLK"
        if kind in b"xg":
            self._skip = _padded(size)
            if kind == ord("x") and 0 < size <= _MAX_PAX_BYTES:
                self._pax, self._pax_left = bytearray(), size
            return
        if kind not in b"LK":
            self.members += 1
            size, self._pax_size = (size if self._pax_size is None else self._pax_size), None
        if kind in _KINDS_WITHOUT_DATA:
            self._optional_data = _padded(size)  # some writers store the data of a hard link again
        elif kind == ord("S") and block[482]:
            self._in_sparse_map, self._skip_after_map = True, _padded(size)
        else:
            self._skip = _padded(size)

    def _parse_pax(self, records: bytes) -> None:
        self._pax = None
        found = _PAX_SIZE.search(records)
        if found is not None:
            self._pax_size = int(found[1])


def has_tar_magic(head: bytes) -> bool:
    """Return whether data starts like a tar of POSIX or GNU, whether or not its first header is valid."""
    return head[257:262] == b"ustar"


def is_tar_header(block: bytes) -> bool:
    """Return whether a block has a valid header checksum, the sum of its bytes with or without sign."""
    if len(block) < BLOCK or block == _ZEROS or not block[148:156].strip(b" \0"):
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    signed = unsigned - 256 * len(rest.translate(None, _ASCII))
    return _number(block[148:156]) in (unsigned, signed)


def _number(field: bytes) -> int | None:
    """Return the value of a numeric field, written in octal digits or in GNU's base 256."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if digits.strip(b"01234567"):  # int() accepts a sign, and a negative size would move backwards
        return None
    return int(digits or b"0", 8)


def _padded(size: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK
