"""What keeps a finished file from being admitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backupd.core.model import Digest
from backupd.core.names import as_text
from backupd.core.policy import Reason
from backupd.drop.checksum import Stated

MISSING, UNUSABLE = "checksum_missing", "checksum_unusable"
"""Reasons to wait that are none to reject an archive."""

_HINTS = {
    Reason.CHECKSUM_MISMATCH: "it is rejected if neither of the two changes within `inspect_grace`",
    MISSING: 'put its checksum file beside it, or set `checksum_file` to "auto"',
    UNUSABLE: 'expected a small file of "HASH  NAME"; "auto" does without after `inspect_grace`',
}


@dataclass(frozen=True, slots=True)
class Found:
    """Why a file is not to be admitted: one of the policy's reasons, or a reason to wait."""

    reason: str
    error: str

    @property
    def hint(self) -> str:
        """What to do about it while it waits."""
        other = "look at the device; it is rejected if it does not change within `inspect_grace`"
        return _HINTS.get(self.reason, other)


def compare(stated: Stated, digests: Mapping[str, Digest], *, required: bool) -> Found | None:
    """Compare what checksum files state with an archive's digests by algorithm."""
    for file, digest in stated.digests.items():
        found = digests[digest.algorithm]
        if found != digest:
            return Found(Reason.CHECKSUM_MISMATCH, f"{as_text(file)} states {digest}, but it is {found}")
    if stated.digests:
        return None
    for file, why in stated.unusable.items():
        return Found(UNUSABLE, f"{as_text(file)} is of no use: {why}")
    return Found(MISSING, "there is no checksum file for it") if required else None
