"""Looking into an archive, in small steps and without unpacking it: whether it is whole.

An inspection is a generator: each step reads a little, and whoever drives it decides how many there are.
Nothing is written, memory is bounded, and archives within an archive are not entered.
"""

from __future__ import annotations

from collections.abc import Generator

from backupd.core.inspection import HEAD, Finding, Kind, UnsoundError, kind_of, promises_tar_within
from backupd.core.policy import Reason
from backupd.core.tar import TarError, TarWalk
from backupd.drop.ends import looks_whole
from backupd.drop.expand import LimitReachedError, Output, expand
from backupd.drop.source import CHUNK, Source
from backupd.drop.zip import walk_zip
from backupd.drop.zstd import walk_zstd

__all__ = ["LimitReachedError", "inspect"]

Inspection = Generator[None, None, Finding | None]


def inspect(fd: int, size: int, name: bytes, *, full: bool) -> Inspection:
    """Return what is wrong with an archive that is open for reading, None if nothing was found.

    Without `full` only the ends are looked at; what is suspicious there is read in full, as only that is
    sure. Raises LimitReachedError where it would take too much to go on, and OSError where it can't be read.
    """
    source = Source(fd, size)
    kind = kind_of(name, source.read(0, HEAD))
    if kind is None or isinstance(kind, Finding):
        return kind
    if not full and looks_whole(source, kind):
        return None
    try:
        yield from _whole(source, kind, tar=promises_tar_within(name))
    except UnsoundError as error:
        return error.finding
    except TarError as error:
        return Finding(Reason.TRUNCATED if error.cut else Reason.DAMAGED, str(error))
    return None


def _whole(source: Source, kind: Kind, *, tar: bool) -> Generator[None, None, None]:
    match kind:
        case Kind.TAR:
            yield from _walk_tar(source)
        case Kind.ZIP:
            yield from walk_zip(source)
        case Kind.ZSTD:
            yield from walk_zstd(source)
        case _:
            output = Output(source.size, tar=tar)
            yield from expand(source, kind, output)
            output.finish()


def _walk_tar(source: Source) -> Generator[None, None, None]:
    walk, at = TarWalk(), 0
    while not walk.ended and (data := source.read(at, CHUNK)):
        walk.feed(data)
        at += len(data)
        yield
    walk.finish()
