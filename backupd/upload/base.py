"""What the rest of the program asks of an uploader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from backupd.core.model import Digest, Fingerprint, Outcome

OnProgress = Callable[[int], None]
"""Called with the bytes of the archive handed to the connection so far."""

OnAlive = Callable[[], None]
"""Called at least once a second while an upload waits or works, however slow it is.

`resting` is called before the waits in which it is not: those for the name service, and for a token.
"""


def _no_progress(_sent: int) -> None:
    return


def _unwatched() -> None:
    return


@dataclass(slots=True)
class UploadJob:
    """One archive, open for reading, on its way to one destination.

    `fd` is read with `pread` and not closed; `variables` are the values of templates; `unknown` is the
    digest of an earlier attempt whose answer was lost. `sent` is set by the uploader, in bytes of the
    archive.
    """

    delivery_id: str
    name: bytes
    fd: int
    fingerprint: Fingerprint
    variables: Mapping[str, str]
    on_progress: OnProgress = _no_progress
    on_alive: OnAlive = _unwatched
    on_idle: OnAlive = _unwatched
    unconfirmed_digest: Digest | None = None
    sent_bytes: int = field(default=0, init=False)


class Uploader(Protocol):
    """Brings archives to one destination, one at a time; each worker has its own.

    Every failure that is to be expected is an outcome: `upload` raises only for bugs.
    """

    def upload(self, cargo: UploadJob) -> Outcome:
        """Send an archive and verify the receipt."""
        ...

    def query(self, cargo: UploadJob, digest: Digest) -> Outcome | None:
        """Return what the destination says of a content that it was sent, None if it does not have it.

        `Delivered` only where it states that very digest. Nothing of the archive is read. Where it can't be
        asked, this is the failure.
        """
        ...

    def close(self) -> None:
        """Give connections back."""
        ...
