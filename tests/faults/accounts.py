"""The accounts of many uploads: what each writer has finished or broken off, compared with what arrived."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import random
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from backupd.core.drop_problem import SUSPICIOUS
from backupd.core.eligibility import COMPANION_SUFFIXES, is_temporary
from backupd.core.policy import Reason

STUMP_REASONS = frozenset((SUSPICIOUS, Reason.TRUNCATED, Reason.DAMAGED, "too_small"))
"""The reasons with which a stump is a problem."""

_PLAIN_NAMES = (
    "sw{}.cfg",
    "sw{}-confg",
    "R{}-Nov-29-21-00-00.000-UTC-0",
    "sw{}.cfg-20260101",
    "fw{}+core@site=1.txt",
    "config.boot.{}",
    "{}/running-config",
)
_PACKED_NAMES = {
    "gz": ("core{}.cfg.gz", "{}/startup-config.gz"),
    "tar.gz": ("fw{}.tar.gz", "R{}.tgz"),
    "zip": ("wlc{}.zip",),
    "xz": ("sw{}.cfg.xz",),
    "bz2": ("sw{}.cfg.bz2",),
}


class UploadState(StrEnum):
    """How far an upload is: `BROKEN_OFF` will be completed later, a `STUMP` never."""

    UPLOADING = "uploading"
    FINISHED = "finished"
    BROKEN_OFF = "broken off"
    STUMP = "stump"


@dataclass(slots=True)
class Upload:
    """One content, and the names below a drop folder that it has or had there.

    An undetectable content, such as text, has no end mark; only writers that hide it leave a stump of it.
    """

    drop: str
    tool: str
    names: list[str]
    source: Path
    digest: str
    size: int
    is_detectable: bool
    state: UploadState = UploadState.UPLOADING
    broken_off: int = 0
    """How many times it was broken off on purpose."""
    failed: int = 0
    """How many times it failed for another reason, such as a dead mount."""

    @property
    def is_complete(self) -> bool:
        return self.state is UploadState.FINISHED

    @property
    def had_stump(self) -> bool:
        """Whether an unfinished content may have been found under the final name."""
        return self.broken_off + self.failed > 0 or self.state is not UploadState.FINISHED

    def __str__(self) -> str:
        return f"{self.drop}: {self.names[0]} ({self.size} bytes by {self.tool}, {self.state})"


@dataclass(slots=True)
class Contents:
    """Makes contents that exist once, each in a file of `folder`."""

    folder: Path
    chance: random.Random
    _digests: set[str] = field(default_factory=set)
    _number: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self, drop: str, tool: str, *, detectable: bool, size: int | None = None) -> Upload:
        """Return a new upload with its content in a file; `size` is about that of the data in it."""
        with self._lock:
            self._number += 1
            number = self._number
            size = (
                self.chance.choice((1, 30, 2_000, 2_000, 40_000, 300_000, 3_000_000))
                if size is None
                else size
            )
            content, name = self._unique(number, size, detectable=detectable)
            digest = hashlib.sha256(content).hexdigest()
            self._digests.add(digest)
            folder = self.chance.choice(("", "", "edge/", "core/rack-2/"))
        source = self.folder / str(number)
        source.write_bytes(content)
        source.chmod(0o644)
        names = [name if "/" in name else folder + name]
        return Upload(drop, tool, names, source, digest, len(content), detectable)

    def _unique(self, number: int, size: int, *, detectable: bool) -> tuple[bytes, str]:
        while True:
            kind = self.chance.choice([*_PACKED_NAMES])
            names = _PACKED_NAMES[kind] if detectable else _PLAIN_NAMES
            content = self.chance.randbytes(size)
            content = _packed(kind, content) if detectable else content.hex().encode()[:size]
            if hashlib.sha256(content).hexdigest() not in self._digests:
                return content, self.chance.choice(names).format(number)
            size += 1


def _packed(kind: str, data: bytes) -> bytes:
    packed = io.BytesIO()
    match kind:
        case "gz":
            return gzip.compress(data, 1)
        case "xz":
            return lzma.compress(data, preset=0)
        case "bz2":
            return bz2.compress(data, 1)
        case "zip":
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("running-config", data)
        case _:
            with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
                member = tarfile.TarInfo("etc/startup-config")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


@dataclass(frozen=True, slots=True)
class SentFile:
    """An archive in `sent/`, with the digest that its receipt file states; None if it has none."""

    drop: str
    path: str
    digest: str
    receipt: str | None


@dataclass(frozen=True, slots=True)
class Arrived:
    """The state of the receiver, the folders and the ledger at the end; files are pairs of drop and path."""

    stored: Counter[str]
    """The number of copies of each content that the receiver has, by digest."""
    delivered: Mapping[str, set[tuple[str, str]]]
    """The files that were delivered with each digest."""
    problems: Mapping[tuple[str, str], str]
    """The reason of each listed problem."""
    suspicious: set[tuple[str, str]]
    """The files that were ever logged as `archive.suspicious`."""
    missing: set[tuple[str, str]]
    """The files that were ever logged as `archive.missing`."""
    sent: Sequence[SentFile]
    rejected: Sequence[tuple[str, str]]
    left: Sequence[tuple[str, str]]
    """The files that are still in the drop folders."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept for a file; `drop` and `path` are those of the file."""

    drop: str
    path: str
    tool: str
    text: str

    def __str__(self) -> str:
        return f"{self.drop}: {self.path} ({self.tool}): {self.text}"


def compare(uploads: Sequence[Upload], arrived: Arrived) -> Iterator[Violation]:
    """Yield the differences between what the writers did and what arrived."""
    by_name = {(upload.drop, name): upload for upload in uploads for name in upload.names}
    for upload in uploads:
        for text in _faults_of(upload, arrived):
            yield Violation(upload.drop, upload.names[0], upload.tool, text)
    for digest in sorted(set(arrived.stored) - {upload.digest for upload in uploads}):
        yield from _faults_of_other_content(digest, by_name, arrived)
    faults = [
        ((sent.drop, sent.path), text) for sent in arrived.sent for text in _faults_of_sent(sent, arrived)
    ]
    for file, text in (*faults, *_faults_of_files(by_name, arrived)):
        owner = by_name.get(file)
        yield Violation(*file, owner.tool if owner else "-", text)


def _faults_of_files(
    by_name: Mapping[tuple[str, str], Upload], arrived: Arrived
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield each file that is in the wrong place or is reported without a reason, and what is wrong."""
    for file in arrived.rejected:
        yield file, "it was rejected"
    for file in arrived.left:
        if not may_be_left(*file, arrived.left, arrived.problems):
            yield file, "it is still in the drop folder, and is no problem"
    for file, reason in arrived.problems.items():
        owner = by_name.get(file)
        if owner is None or owner.is_complete or reason not in STUMP_REASONS:
            yield file, f"it is listed as {reason}, and is {owner.state if owner else 'no upload'}"
    for file in sorted(arrived.missing):
        owner = by_name.get(file)
        if owner is None or len(owner.names) == 1:
            yield file, "it was logged as missing, and nobody removed it"


def _faults_of(upload: Upload, arrived: Arrived) -> Iterator[str]:
    copies = arrived.stored[upload.digest]
    if copies > len(upload.names):
        yield f"the receiver has {copies} copies for {len(upload.names)} names"
    if upload.state is UploadState.FINISHED and not copies:
        yield "it was finished, and the receiver does not have it"
    if upload.state in (UploadState.UPLOADING, UploadState.BROKEN_OFF):
        yield "the campaign has not ended its upload"
    if upload.state is UploadState.STUMP and not copies:
        file = (upload.drop, upload.names[0])
        is_left = file in arrived.left and not may_be_left(*file, arrived.left, ())
        if file not in arrived.problems and (is_left or file in arrived.suspicious):
            yield "its stump is no listed problem"


def _faults_of_sent(sent: SentFile, arrived: Arrived) -> Iterator[str]:
    if sent.receipt is None:
        yield "it is in sent/ without a receipt file"
    elif sent.receipt != sent.digest:
        yield "its receipt file in sent/ states another digest"
    elif sent.digest not in arrived.stored:
        yield "it is in sent/, and the receiver does not have it"


def _faults_of_other_content(
    digest: str, by_name: Mapping[tuple[str, str], Upload], arrived: Arrived
) -> Iterator[Violation]:
    """Yield a violation unless an unfinished content that was delivered is the stump of an upload."""
    files = arrived.delivered.get(digest, set())
    if not files:
        yield Violation("-", digest[:16], "-", "the receiver has a content that the ledger does not know")
    for drop, path in sorted(files):
        upload = by_name.get((drop, path))
        if upload is None:
            yield Violation(drop, path, "-", "a file that nobody wrote was delivered")
        elif not upload.had_stump:
            yield Violation(drop, path, upload.tool, "it was delivered with unfinished content")
        elif upload.is_complete and upload.is_detectable and (drop, path) not in arrived.suspicious:
            yield Violation(drop, path, upload.tool, "its stump was delivered and never a problem")
        elif not upload.is_complete and (drop, path) not in arrived.problems:
            yield Violation(drop, path, upload.tool, "its stump was delivered and is no listed problem")


def may_be_left(
    drop: str, path: str, left: Sequence[tuple[str, str]], problems: Collection[tuple[str, str]]
) -> bool:
    """Return whether a file stays in its drop folder: a problem, or one that is still being written.

    A temporary name is a problem after a day, and a file with a companion after an hour.
    """
    if (drop, path) in problems:
        return True
    has_companion = any((drop, path + suffix.decode()) in left for suffix in COMPANION_SUFFIXES)
    return has_companion or any(is_temporary(part.encode()) for part in path.split("/"))
