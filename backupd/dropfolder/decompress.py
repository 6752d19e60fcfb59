"""Decompressing gzip, bzip2, xz and zstd data in bounded memory to check that it is whole.

Nothing is written. Reading, decompressing and hashing release the interpreter's lock.
"""

from __future__ import annotations

import bz2
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backupd.core.archive_formats import ArchiveKind, UnsoundError, is_bgzf, is_cut_magic, magics
from backupd.core.policy import Reason

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_CHUNK_BYTES = 256 * 1024
"""Bytes of a file that are read at once."""

_BGZF_HEADER_BYTES = 18

_PIECE_BYTES = 1 << 20
"""Bytes of decompressed data that are produced at once, at most."""

_FREE_OUTPUT_BYTES = 256 << 20
_MAX_EXPANSION = 200

_MAX_XZ_MEMORY_BYTES = 80 << 20
"""Bytes of memory for decompressing xz; `xz -9` needs 65 MiB."""

_MAX_ZSTD_WINDOW_LOG = 27
"""Binary logarithm of the largest zstd window in bytes: 128 MiB, the limit of `zstd -d` as well."""

_UNINSPECTABLE = {
    "memory usage limit": f"needs more than {_MAX_XZ_MEMORY_BYTES >> 20} MiB for its xz dictionary",
    "too much memory": f"needs more than {1 << _MAX_ZSTD_WINDOW_LOG >> 20} MiB for its zstd window",
    "dictionary mismatch": "was compressed with a zstd dictionary, which it does not contain",
}
"""Parts of the messages of lzma and zstd for data that may be good, but can't be decompressed here."""

ShouldStop = Callable[[], bool]
"""Called at least once for each chunk that is read or decompressed; True ends the work."""


class StoppedError(Exception):
    """The caller's `should_stop` has ended the work."""


class UninspectableError(Exception):
    """An archive can't be inspected, which is no sign of damage.

    It expands to more data, needs more memory than is allowed, or needs a dictionary.
    """


def max_output_bytes(size: int) -> int:
    """Return how many bytes a file of `size` bytes may expand to: 256 MiB plus 200 times its size."""
    return _FREE_OUTPUT_BYTES + _MAX_EXPANSION * size


@dataclass(frozen=True, slots=True)
class BoundedFile:
    """A file, open for reading, and the size in bytes beyond which nothing is read from it."""

    fd: int
    size: int
    should_stop: ShouldStop

    def raise_if_stopped(self) -> None:
        """Raise StoppedError if the caller wants no result any more."""
        if self.should_stop():
            raise StoppedError

    def read(self, offset: int, max_bytes: int) -> bytes:
        """Return up to `max_bytes` bytes from a position, fewer only at the end.

        Raises OSError and StoppedError.
        """
        self.raise_if_stopped()
        max_bytes = min(max_bytes, self.size - offset)
        data = b""
        while max_bytes > len(data):
            more = os.pread(self.fd, max_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def chunks(self, offset: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `offset` to `end`, or to the end of the file; raises as `read` does."""
        end = self.size if end is None else end
        while offset < end and (data := self.read(offset, min(_CHUNK_BYTES, end - offset))):
            offset += len(data)
            yield data


class ZlibDecoder:
    """zlib with the interface of `bz2.BZ2Decompressor`; `wbits` is 31 for gzip, -15 for raw deflate data."""

    def __init__(self, wbits: int = 31) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.needs_input, self.eof, self.unused_data = True, False, b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Read the next bytes, which may be none, and return up to `max_length` decompressed bytes."""
        piece = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = len(piece) < max_length and not self._zlib.unconsumed_tail
        self.eof, self.unused_data = self._zlib.eof, self._zlib.unused_data
        return piece


Decoder = bz2.BZ2Decompressor | lzma.LZMADecompressor | zstd.ZstdDecompressor | ZlibDecoder
"""A decompressor of one stream; all have the same interface."""


def decompress_streams(source: BoundedFile, kind: ArchiveKind) -> Iterator[bytes]:
    """Yield the decompressed bytes of all concatenated streams of a file.

    Bytes after the last stream are ignored, as gzip and bzip2 do with a warning. Raises as `decompress`
    does, and UnsoundError if the file ends within a stream or its magic number, or without the empty stream
    that ends a file of bgzip.
    """
    chunks, data = source.chunks(), b""
    has_end_stream = kind is ArchiveKind.GZIP and is_bgzf(source.read(0, _BGZF_HEADER_BYTES))
    while True:
        decoder, is_empty = _new_decoder(kind), True
        for piece in decompress(source, decoder, chunks, kind, data):
            is_empty = is_empty and not piece
            yield piece
        if not decoder.eof:
            raise UnsoundError(Reason.TRUNCATED, f"the archive ends in the middle of its {kind} data")
        data = decoder.unused_data.lstrip(b"\0")
        while len(data) < len(magics(kind)[0]) and (more := next(chunks, b"")):
            data = (data + more).lstrip(b"\0")
        if is_cut_magic(data, kind):
            raise UnsoundError(Reason.TRUNCATED, f"the archive ends in the header of its next {kind} data")
        if not data.startswith(magics(kind)):
            if has_end_stream and not is_empty:
                raise UnsoundError(Reason.TRUNCATED, "the archive ends without the end block of bgzip")
            return


def decompress(
    source: BoundedFile, decoder: Decoder, chunks: Iterator[bytes], format_name: str, data: bytes = b""
) -> Iterator[bytes]:
    """Yield the decompressed bytes of one stream, until its end or that of the input.

    The input is `data` and then `chunks`, which are read from `source`. Raises UnsoundError for damaged data,
    UninspectableError for data that needs too much memory or a dictionary, OSError and StoppedError.
    """
    while not decoder.eof:
        if not data and decoder.needs_input and not (data := next(chunks, b"")):
            return
        source.raise_if_stopped()
        try:
            piece = decoder.decompress(data, _PIECE_BYTES)
        except (zlib.error, lzma.LZMAError, zstd.ZstdError, OSError, ValueError) as error:
            for part, why in _UNINSPECTABLE.items():
                if part in str(error).lower():
                    raise UninspectableError(f"the archive {why}") from error
            raise UnsoundError(Reason.DAMAGED, f"the {format_name} data is damaged: {error}") from error
        data = b""
        yield piece


def _new_decoder(kind: ArchiveKind) -> Decoder:
    match kind:
        case ArchiveKind.BZIP2:
            return bz2.BZ2Decompressor()
        case ArchiveKind.XZ:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_MEMORY_BYTES)
        case ArchiveKind.ZSTD:
            return zstd.ZstdDecompressor(
                options={zstd.DecompressionParameter.window_log_max: _MAX_ZSTD_WINDOW_LOG}
            )
        case _:
            return ZlibDecoder()
