"""Which files are stable: unchanged for long enough to be complete."""

from __future__ import annotations

from dataclasses import dataclass, field

from backupd.core.model import Fingerprint

_MIN_HOLD_SECONDS = 0.5


@dataclass(slots=True)
class StabilityTracker:
    """Tracks the unfinished files of a drop until each has been unchanged for `stable_for` seconds.

    Times are seconds of a monotonic clock.
    """

    stable_for: float
    # Two tables: within each, all entries wait equally long, so insertion order is the order of `due`.
    _waiting: dict[bytes, _Observation] = field(default_factory=dict)
    _held: dict[bytes, _Observation] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._held)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._waiting or relpath in self._held

    def observe(self, relpath: bytes, fingerprint: Fingerprint, now: float) -> bool:
        """Record the current fingerprint of a file, and return whether the file is stable.

        A stable file is no longer tracked.
        """
        known = self._waiting.get(relpath) or self._held.get(relpath)
        if known is not None and known.fingerprint == fingerprint:
            if now < known.due:
                return False
            self.forget(relpath)
            return True
        self.forget(relpath)
        if self.stable_for <= 0:
            return True
        self._waiting[relpath] = _Observation(fingerprint, now + self.stable_for)
        return False

    def forget(self, relpath: bytes) -> None:
        """Stop tracking a file: it is stable, has changed, is missing, or cannot become an archive."""
        self._waiting.pop(relpath, None)
        self._held.pop(relpath, None)

    def hold(self, relpath: bytes, fingerprint: Fingerprint, now: float) -> None:
        """Make a file that has changed or is open for writing wait again, for half a second at least."""
        self.forget(relpath)
        self._held[relpath] = _Observation(fingerprint, now + max(_MIN_HOLD_SECONDS, self.stable_for))

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
    """The last fingerprint of a file, and the time at which the file is stable if it does not change."""

    fingerprint: Fingerprint
    due: float
