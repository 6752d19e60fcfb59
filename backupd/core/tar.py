"""Following a tar through its headers as it streams by; POSIX ustar and pax, GNU and the old form."""

from __future__ import annotations

import re

BLOCK = 512
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
