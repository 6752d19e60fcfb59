"""What an archive should look like: its kind by content and by name, and what can be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from backupd.core.policy import Reason
from backupd.core.tar import BLOCK, is_tar_header

HEAD = BLOCK
"""Bytes from the beginning of a file that tell its kind."""


class Kind(StrEnum):
    """A format that is known well enough to tell whether a file of it is whole."""

    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    ZSTD = "zstd"
    ZIP = "zip"
    TAR = "tar"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with an archive, as the policy calls it and in words."""

    reason: Reason
    error: str


class UnsoundError(Exception):
    """An archive is not whole; only for within an inspection, the outcome of which is a `Finding`."""

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(error)
        self.finding = Finding(reason, error)


_BZIP2_BLOCKS = (bytes.fromhex("314159265359"), bytes.fromhex("177245385090"))
_MAGIC = {
    Kind.GZIP: (b"\x1f\x8b\x08",),
    Kind.BZIP2: tuple(b"BZh%d" % level + block for level in range(1, 10) for block in _BZIP2_BLOCKS),
    Kind.XZ: (b"\xfd7zXZ\0",),
    Kind.ZSTD: (b"\x28\xb5\x2f\xfd",),
    Kind.ZIP: (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08PK\x03\x04", b"PK00PK\x03\x04"),
}

_BY_ENDING = {
    b".gz": Kind.GZIP,
    b".tgz": Kind.GZIP,
    b".bz2": Kind.BZIP2,
    b".tbz": Kind.BZIP2,
    b".tbz2": Kind.BZIP2,
    b".xz": Kind.XZ,
    b".txz": Kind.XZ,
    b".zst": Kind.ZSTD,
    b".tzst": Kind.ZSTD,
    b".zip": Kind.ZIP,
    b".tar": Kind.TAR,
}
_TAR_WITHIN = (b".tar.gz", b".tar.bz2", b".tar.xz", b".tgz", b".tbz", b".tbz2", b".txz")


def magics(kind: Kind) -> tuple[bytes, ...]:
    """Return how files of a kind begin; nothing for tar, whose first block has a checksum instead."""
    return _MAGIC.get(kind, ())


def kind_by_name(name: bytes) -> Kind | None:
    """Return the kind that a name promises."""
    name = name.lower()
    return next((kind for ending, kind in _BY_ENDING.items() if name.endswith(ending)), None)


def promises_tar_within(name: bytes) -> bool:
    """Tell whether a name promises a tar below a compression."""
    return name.lower().endswith(_TAR_WITHIN)


def kind_by_content(head: bytes) -> Kind | None:
    """Return the kind that the first `HEAD` bytes are of."""
    for kind, beginnings in _MAGIC.items():
        if head.startswith(beginnings):
            return kind
    return Kind.TAR if is_tar_header(head[:BLOCK]) else None


def kind_of(name: bytes, head: bytes) -> Kind | Finding | None:
    """Return what to inspect a file as, or what is wrong with its beginning; None if it is of no known kind.

    The content decides. The name only makes a content suspicious that is of no known kind.
    """
    promised, found = kind_by_name(name), kind_by_content(head)
    if found is not None or promised is None:
        return found
    if not head.strip(b"\0"):
        return Finding(Reason.TRUNCATED, "holds nothing" + (" but zeros" if head else ""))
    if len(head) < HEAD and (
        promised is Kind.TAR or any(magic.startswith(head) for magic in magics(promised))
    ):
        return Finding(
            Reason.TRUNCATED, f"ends after {len(head)} bytes, within the beginning of a {promised}"
        )
    return Finding(Reason.DAMAGED, f"named like a {promised}, but does not begin like one")
