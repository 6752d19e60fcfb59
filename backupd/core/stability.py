"""Which files are stable: unchanged for long enough to be complete."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from backupd.core.model import Digest, Fingerprint, may_have_content_of

_MIN_HOLD_SECONDS = 0.5


class Stability(Enum):
    """Whether a file is stable.

    A file is `TOUCHED` if its size and modification time were unchanged for long enough, but not its change
    time or inode: its content has to be read to decide.
    """

    WAITING = auto()
    STABLE = auto()
    TOUCHED = auto()


@dataclass(slots=True)
class StabilityTracker:
    """Tracks the unfinished files of a drop until each has been unchanged for `stable_for` seconds.

    Times are seconds of a monotonic clock. A change of metadata alone does not restart the wait.
    """

    stable_for: float
    # Two tables: within each, all entries wait equally long, so insertion order is the order of `due`.
    _waiting: dict[bytes, _Observation] = field(default_factory=dict)
    _held: dict[bytes, _Observation] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._held)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._waiting or relpath in self._held

    def is_waiting(self) -> bool:
        """Return whether a file may become stable by itself: it is not held because a writer has it open."""
        return bool(self._waiting) or any(held.digest is not None for held in self._held.values())

    def observe(self, relpath: bytes, fingerprint: Fingerprint, now: float) -> Stability:
        """Record the current fingerprint of a file, and return whether the file is stable.

        Only a waiting file is still tracked.
        """
        table = self._waiting if relpath in self._waiting else self._held
        known = table.get(relpath)
        if known is not None and may_have_content_of(fingerprint, known.fingerprint):
            was_touched = known.was_touched or known.fingerprint != fingerprint
            if now < known.due:
                table[relpath] = _Observation(fingerprint, known.due, was_touched, known.digest)
                return Stability.WAITING
            self.forget(relpath)
            return Stability.TOUCHED if was_touched else Stability.STABLE
        self.forget(relpath)
        if self.stable_for <= 0:
            return Stability.STABLE
        self._waiting[relpath] = _Observation(fingerprint, now + self.stable_for)
        return Stability.WAITING

    def digest_of(self, relpath: bytes) -> Digest | None:
        """Return the digest with which a file is held, if any."""
        known = self._held.get(relpath)
        return known.digest if known else None

    def forget(self, relpath: bytes) -> None:
        """Stop tracking a file: it is stable, has changed, is missing, or cannot become an archive."""
        self._waiting.pop(relpath, None)
        self._held.pop(relpath, None)

    def hold(
        self, relpath: bytes, fingerprint: Fingerprint, now: float, digest: Digest | None = None
    ) -> None:
        """Make a file that has changed or is open for writing wait again, for half a second at least.

        `digest` is that of the content of a touched file: it is stable once it is read again and the same.
        """
        self.forget(relpath)
        due = now + max(_MIN_HOLD_SECONDS, self.stable_for)
        self._held[relpath] = _Observation(fingerprint, due, digest=digest)

    def due(self, now: float) -> list[bytes]:
        """Return the paths of the files to check now, because they may have become stable."""
        ready: list[bytes] = []
        for table in (self._waiting, self._held):
            for relpath, observation in table.items():
                if now < observation.due:
                    break
                ready.append(relpath)
        return ready

    def next_due(self) -> float | None:
        """Return the time at which the next file is due, or None if no file is tracked."""
        firsts = (next(iter(table.values()), None) for table in (self._waiting, self._held))
        return min((first.due for first in firsts if first is not None), default=None)


@dataclass(frozen=True, slots=True)
class _Observation:
    """The last fingerprint of a file, and the time at which the file is stable if it does not change.

    `was_touched` is whether its metadata changed since the wait began.
    """

    fingerprint: Fingerprint
    due: float
    was_touched: bool = False
    digest: Digest | None = None
