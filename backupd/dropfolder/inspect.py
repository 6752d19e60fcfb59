"""Checking whether an archive is whole, without unpacking it.

Nothing is written, memory is bounded, and archives inside an archive, other than one compressed tar, are not
inspected.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from backupd.core.archive_formats import (
    BLOCK,
    EMPTY,
    HEAD,
    MISNAMED,
    ArchiveKind,
    Damage,
    Note,
    TarError,
    TarWalk,
    UnsoundError,
    expects_tar_inside,
    has_tar_magic,
    is_tar_header,
    kind_of,
    misnamed_note,
)
from backupd.core.policy import Reason
from backupd.dropfolder.decompress import (
    BoundedFile,
    ShouldStop,
    UninspectableError,
    decompress_streams,
    max_output_bytes,
)
from backupd.dropfolder.zipwalk import check_zip, has_central_directory

_BZIP2_END = 0x177245385090
_TAIL_BYTES = 4096


def inspect(fd: int, size: int, name: bytes, *, full: bool, should_stop: ShouldStop) -> Damage | Note | None:
    """Return the damage of an archive that is open for reading, a note, or None if there is nothing to note.

    Without `full`, only the first and the last bytes are checked; if these are not right, the archive is read
    in full, as only that is certain. Raises UninspectableError, StoppedError once `should_stop` returns True,
    and OSError if the archive can't be read.
    """
    source = BoundedFile(fd, size, should_stop)
    kind = kind_of(name, source.read(0, HEAD), size)
    if not isinstance(kind, ArchiveKind):
        return kind
    note = misnamed_note(name, kind)
    if not full and has_valid_end(source, kind):
        return note
    try:
        return _read_all(source, kind, tar=expects_tar_inside(name)) or note
    except UnsoundError as error:
        return error.damage
    except TarError as error:
        return Damage(Reason.TRUNCATED if error.truncated else Reason.DAMAGED, str(error))


def has_valid_end(source: BoundedFile, kind: ArchiveKind) -> bool:
    """Return whether the last bytes of a file are those of a complete archive of a kind.

    False for gzip and zstd, of which the end can't be recognized. A gzip file ends with the size of its data
    modulo 4 GiB, but a truncated one with a random number: for a file of 100 MiB, one in six of these is
    plausible, for one of 600 MiB all are.
    """
    tail = source.read(max(source.size - _TAIL_BYTES, 0), _TAIL_BYTES)
    match kind:
        case ArchiveKind.BZIP2:
            return _has_bzip2_end(tail)
        case ArchiveKind.XZ:
            return _has_xz_footer(tail)
        case ArchiveKind.TAR:
            return source.size > BLOCK and tail.endswith(bytes(BLOCK))
        case ArchiveKind.ZIP:
            return has_central_directory(source)
        case _:
            return False


def _has_bzip2_end(tail: bytes) -> bool:
    """Return whether a file ends with the end mark: 48 bits, 32 bits of checksum, 0 to 7 bits of padding."""
    bits = int.from_bytes(tail[-11:], "big") >> 32
    return len(tail) > 14 and any(bits >> pad & (1 << 48) - 1 == _BZIP2_END for pad in range(8))


def _has_xz_footer(tail: bytes) -> bool:
    """Return whether a file ends with a valid stream footer; The .xz File Format, section 2.1.2."""
    footer = tail.rstrip(b"\0")[-12:]
    return (
        len(footer) == 12
        and footer[10:] == b"YZ"
        and int.from_bytes(footer[:4], "little") == zlib.crc32(footer[4:10])
    )


def _read_all(source: BoundedFile, kind: ArchiveKind, *, tar: bool) -> Note | None:
    match kind:
        case ArchiveKind.ZIP:
            return check_zip(source)
        case ArchiveKind.TAR:
            return _check_data(source.chunks(), source.size, tar=True)
        case _:
            return _check_data(decompress_streams(source, kind), source.size, tar=tar)


def _check_data(pieces: Iterable[bytes], size: int, *, tar: bool) -> Note | None:
    """Check the data of a file of `size` bytes, and the tar in it; with `tar`, its absence is noted.

    Raises UnsoundError or TarError if it is not whole, and UninspectableError if there is too much of it.
    """
    limit = max_output_bytes(size)
    head, total, walk = b"", 0, None
    for piece in pieces:
        data, total = piece, total + len(piece)
        if total > limit:
            raise UninspectableError(f"the archive expands to more than {limit >> 20} MiB")
        if len(head) < BLOCK:
            data = head + piece
            head = data[:BLOCK]
            walk = TarWalk() if is_tar_header(head) else None
        if walk is not None:
            walk.feed(data)
    if not total:
        return Note(EMPTY, "the archive contains no data")
    if walk is not None:
        return walk.finish()
    if tar and not head.strip(b"\0"):
        return Note(EMPTY, "the tar in the archive is empty")
    if tar and has_tar_magic(head):
        raise UnsoundError(Reason.DAMAGED, "the first header of the tar is damaged")
    if tar:
        return Note(MISNAMED, "it has the name of a compressed tar, but contains no tar")
    return None
