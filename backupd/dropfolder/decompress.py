"""Decompressing an archive in small steps, to see that it can be; what comes out is only looked at."""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from backupd.core.archive_formats import BLOCK, ArchiveKind, TarWalk, UnsoundError, is_tar_header, magics
from backupd.core.policy import Reason

CHUNK = 256 * 1024


@dataclass(frozen=True, slots=True)
class BoundedFile:
    """An open file and its size, beyond which nothing is read; its methods raise OSError."""

    fd: int
    size: int

    def read(self, at: int, most: int) -> bytes:
        """Return up to `most` bytes from a place, fewer only at the end."""
        most = min(most, self.size - at)
        data = b""
        while most > len(data):
            more = os.pread(self.fd, most - len(data), at + len(data))
            if not more:
                break
            data += more
        return data


STEP = 1 << 20
"""Bytes that come out at a time."""

_FREE = 256 << 20
_RATIO = 200
_MOST_DICTIONARY = 80 << 20
"""Bytes of memory for xz; `xz -9` needs 65 MiB."""


class LimitReachedError(Exception):
    """To inspect the rest would take more than an honest archive does."""


class DecompressedOutput:
    """What comes out of a compression: counted, and followed where it is a tar."""

    def __init__(self, size: int, *, tar: bool) -> None:
        self._most = _FREE + _RATIO * size
        self._promised = tar
        self._head = b""
        self._tar: TarWalk | None = None
        self._total = 0

    def feed(self, data: bytes) -> None:
        """Look at the next bytes; raises LimitReachedError once there are too many, TarError for no tar."""
        before, self._total = self._total, self._total + len(data)
        if self._total > self._most:
            raise LimitReachedError(f"{self._total} bytes and more came out of it")
        if before < BLOCK:
            self._head += data
            if self._total < BLOCK:
                return
            data, self._head = self._head, self._head[:BLOCK]
            if is_tar_header(self._head):
                self._tar = TarWalk()
        if self._tar is not None:
            self._tar.feed(data)

    def finish(self) -> None:
        """Tell that nothing follows; raises UnsoundError or TarError if there should have."""
        if not self._total:
            raise UnsoundError(Reason.TRUNCATED, "holds nothing")
        if self._tar is not None:
            self._tar.finish()
        elif self._promised:
            if not self._head.strip(b"\0"):
                raise UnsoundError(Reason.TRUNCATED, "the tar within holds nothing")
            raise UnsoundError(Reason.DAMAGED, "named like a tar, but there is none within")


class Decoder(Protocol):
    """One compressed stream; `push` returns at most `STEP` bytes."""

    def push(self, data: bytes) -> bytes:
        """Take the next bytes, which may be none, and return what comes out."""
        ...

    @property
    def hungry(self) -> bool:
        """Whether nothing more comes out without more input."""
        ...

    @property
    def eof(self) -> bool:
        """Whether the stream's own end was seen, its checksum verified."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What follows the stream's end."""
        ...


class Inflate:
    """A `Decoder` on zlib; `bits` is 31 for gzip, -15 for bare deflate."""

    def __init__(self, bits: int = 31) -> None:
        self._zlib = zlib.decompressobj(bits)
        self.hungry = True

    def push(self, data: bytes) -> bytes:
        """See `Decoder.push`."""
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, STEP)
        self.hungry = len(out) < STEP and not self._zlib.unconsumed_tail
        return out

    @property
    def eof(self) -> bool:
        """See `Decoder.eof`."""
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        """See `Decoder.unused_data`."""
        return self._zlib.unused_data


class _Blocks:
    """A `Decoder` on bz2 or lzma."""

    def __init__(self, codec: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._codec = codec

    def push(self, data: bytes) -> bytes:
        return self._codec.decompress(data, STEP)

    @property
    def hungry(self) -> bool:
        return self._codec.needs_input

    @property
    def eof(self) -> bool:
        return self._codec.eof

    @property
    def unused_data(self) -> bytes:
        return self._codec.unused_data


def _decoder(kind: ArchiveKind) -> Decoder:
    match kind:
        case ArchiveKind.BZIP2:
            return _Blocks(bz2.BZ2Decompressor())
        case ArchiveKind.XZ:
            return _Blocks(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_DICTIONARY))
        case _:
            return Inflate()


def push(decoder: Decoder, data: bytes, what: str) -> bytes:
    """Push into a decoder; raises UnsoundError for what it refuses."""
    try:
        return decoder.push(data)
    except lzma.LZMAError as error:
        if "emory usage limit" in str(error):
            raise LimitReachedError("it was compressed with a very large dictionary") from error
        raise UnsoundError(Reason.DAMAGED, f"its {what} data is damaged: {error}") from error
    except (zlib.error, OSError, ValueError) as error:
        raise UnsoundError(Reason.DAMAGED, f"its {what} data is damaged: {error}") from error


def expand(source: BoundedFile, kind: ArchiveKind, output: DecompressedOutput) -> Generator[None, None, None]:
    """Decompress all streams of a file, one behind the other; raises UnsoundError where one is not whole.

    What follows the last one and is none is left alone, as gzip, bzip2 and xz do but for a warning.
    """
    at, data = 0, b""
    while True:
        decoder = _decoder(kind)
        while not decoder.eof:
            if decoder.hungry and not data:
                data = source.read(at, CHUNK)
                at += len(data)
                if not data:
                    raise UnsoundError(Reason.TRUNCATED, f"ends in the middle of its {kind} data")
            output.feed(push(decoder, data, kind))
            data = b""
            yield
        data = decoder.unused_data
        while not data.lstrip(b"\0") or len(data.lstrip(b"\0")) < len(magics(kind)[0]):
            more = source.read(at, CHUNK)
            if not more:
                break
            at += len(more)
            data = data.lstrip(b"\0") + more
            yield
        data = data.lstrip(b"\0")
        if not data.startswith(magics(kind)):
            return
