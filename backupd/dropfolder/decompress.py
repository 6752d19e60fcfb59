"""Decompressing gzip, bzip2 and xz files in small steps to check that they are whole; nothing is written."""

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
"""Bytes of a file that are read in one step."""

STEP = 1 << 20
"""Bytes of decompressed data that are produced in one step, at most."""

_FREE_OUTPUT_BYTES = 256 << 20
_MAX_EXPANSION = 200

_MAX_XZ_MEMORY_BYTES = 80 << 20
"""Bytes of memory for decompressing xz; `xz -9` needs 65 MiB."""


class LimitReachedError(Exception):
    """An inspection was given up: the archive needs more memory or expands to more data than is allowed."""


def max_output_bytes(size: int) -> int:
    """Return how many bytes a file of `size` bytes may expand to: 256 MiB plus 200 times its size."""
    return _FREE_OUTPUT_BYTES + _MAX_EXPANSION * size


@dataclass(frozen=True, slots=True)
class BoundedFile:
    """A file, open for reading, and the size in bytes beyond which nothing is read from it."""

    fd: int
    size: int

    def read(self, offset: int, max_bytes: int) -> bytes:
        """Return up to `max_bytes` bytes from a position, fewer only at the end; raises OSError."""
        max_bytes = min(max_bytes, self.size - offset)
        data = b""
        while max_bytes > len(data):
            more = os.pread(self.fd, max_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class DecompressedOutput:
    """Counts the decompressed bytes of a file of `size` bytes, and checks the tar in them, if there is one.

    With `tar`, there must be one.
    """

    def __init__(self, size: int, *, tar: bool) -> None:
        self._limit = max_output_bytes(size)
        self._requires_tar = tar
        self._head = b""
        self._tar: TarWalk | None = None
        self._total = 0

    def feed(self, data: bytes) -> None:
        """Check the next bytes.

        Raises LimitReachedError once there are too many bytes, and TarError for an invalid tar.
        """
        before, self._total = self._total, self._total + len(data)
        if self._total > self._limit:
            raise LimitReachedError(f"the archive expands to more than {self._limit >> 20} MiB")
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
        """Check that the bytes so far are complete; raises UnsoundError or TarError if they are not."""
        if not self._total:
            raise UnsoundError(Reason.TRUNCATED, "the archive contains no data")
        if self._tar is not None:
            self._tar.finish()
        elif self._requires_tar:
            if not self._head.strip(b"\0"):
                raise UnsoundError(Reason.TRUNCATED, "the tar in the archive is empty")
            raise UnsoundError(
                Reason.DAMAGED, "the archive has the name of a compressed tar, but contains no tar"
            )


def decompress_streams(
    source: BoundedFile, kind: ArchiveKind, output: DecompressedOutput
) -> Generator[None, None, None]:
    """Decompress all concatenated streams of a file into `output`.

    Bytes after the last stream are ignored, as gzip, bzip2 and xz do with a warning. Raises UnsoundError for
    a stream that is damaged or incomplete, LimitReachedError, TarError and OSError.
    """
    offset, data = 0, b""
    while True:
        decoder = _new_decoder(kind)
        while not decoder.eof:
            if decoder.needs_input and not data:
                data = source.read(offset, CHUNK)
                offset += len(data)
                if not data:
                    raise UnsoundError(Reason.TRUNCATED, f"the archive ends in the middle of its {kind} data")
            output.feed(decompress(decoder, data, kind))
            data = b""
            yield
        data = decoder.unused_data
        while not data.lstrip(b"\0") or len(data.lstrip(b"\0")) < len(magics(kind)[0]):
            more = source.read(offset, CHUNK)
            if not more:
                break
            offset += len(more)
            data = data.lstrip(b"\0") + more
            yield
        data = data.lstrip(b"\0")
        if not data.startswith(magics(kind)):
            return


class Decoder(Protocol):
    """A decompressor of one stream."""

    def decompress(self, data: bytes) -> bytes:
        """Read the next bytes, which may be none, and return up to `STEP` bytes of decompressed data."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether more input is needed to get more decompressed data."""
        ...

    @property
    def eof(self) -> bool:
        """Whether the end of the stream was reached and its checksum is right."""
        ...

    @property
    def unused_data(self) -> bytes:
        """The bytes that were read after the end of the stream."""
        ...


class ZlibDecoder:
    """A `Decoder` with zlib; `wbits` is 31 for gzip and -15 for raw deflate data."""

    def __init__(self, wbits: int = 31) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.needs_input = True

    def decompress(self, data: bytes) -> bytes:
        """See `Decoder.decompress`."""
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, STEP)
        self.needs_input = len(out) < STEP and not self._zlib.unconsumed_tail
        return out

    @property
    def eof(self) -> bool:
        """See `Decoder.eof`."""
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        """See `Decoder.unused_data`."""
        return self._zlib.unused_data


class _BlockDecoder:
    """A `Decoder` with bz2 or lzma."""

    def __init__(self, codec: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._codec = codec

    def decompress(self, data: bytes) -> bytes:
        return self._codec.decompress(data, STEP)

    @property
    def needs_input(self) -> bool:
        return self._codec.needs_input

    @property
    def eof(self) -> bool:
        return self._codec.eof

    @property
    def unused_data(self) -> bytes:
        return self._codec.unused_data


def decompress(decoder: Decoder, data: bytes, format_name: str) -> bytes:
    """Return the next decompressed data of a decoder.

    Raises UnsoundError for damaged data, and LimitReachedError for data that needs too much memory.
    """
    try:
        return decoder.decompress(data)
    except lzma.LZMAError as error:
        if "emory usage limit" in str(error):
            raise LimitReachedError(
                f"the archive needs more than {_MAX_XZ_MEMORY_BYTES >> 20} MiB for its xz dictionary"
            ) from error
        raise UnsoundError(Reason.DAMAGED, f"the {format_name} data is damaged: {error}") from error
    except (zlib.error, OSError, ValueError) as error:
        raise UnsoundError(Reason.DAMAGED, f"the {format_name} data is damaged: {error}") from error


def _new_decoder(kind: ArchiveKind) -> Decoder:
    match kind:
        case ArchiveKind.BZIP2:
            return _BlockDecoder(bz2.BZ2Decompressor())
        case ArchiveKind.XZ:
            return _BlockDecoder(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_MEMORY_BYTES))
        case _:
            return ZlibDecoder()
