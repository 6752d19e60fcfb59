"""Which candidates have stayed unchanged for long enough."""

from __future__ import annotations

from dataclasses import dataclass, field

from backupd.core.model import Fingerprint

_SHORTEST_HOLD = 0.5


@dataclass(frozen=True, slots=True)
class _Candidate:
    fingerprint: Fingerprint
    due: float


@dataclass(slots=True)
class StabilityTracker:
    """Remembers from when on each candidate counts as stable, if it stays as it is now.

    Times are seconds of any monotonic clock; `stable_for` is in the same seconds.
    """

    stable_for: float
    _waiting: dict[bytes, _Candidate] = field(default_factory=dict)
    _held: dict[bytes, _Candidate] = field(default_factory=dict)
    # each of the two waits for a fixed time, and so is in the order of `due`

    def __len__(self) -> int:
        return len(self._waiting) + len(self._held)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._waiting or relpath in self._held

    def observe(self, relpath: bytes, fingerprint: Fingerprint, now: float) -> bool:
        """Note how a file looks; return True once it has not changed for `stable_for`, and forget it."""
        known = self._waiting.get(relpath) or self._held.get(relpath)
        if known is not None and known.fingerprint == fingerprint:
            if now < known.due:
                return False
            self.forget(relpath)
            return True
        self.forget(relpath)
        if self.stable_for <= 0:
            return True
        self._waiting[relpath] = _Candidate(fingerprint, now + self.stable_for)
        return False

    def forget(self, relpath: bytes) -> None:
        """Drop a candidate that is gone or no longer eligible."""
        self._waiting.pop(relpath, None)
        self._held.pop(relpath, None)

    def hold(self, relpath: bytes, fingerprint: Fingerprint, now: float) -> None:
        """Let a candidate whose writer is still there wait again, half a second at least."""
        self.forget(relpath)
        self._held[relpath] = _Candidate(fingerprint, now + max(_SHORTEST_HOLD, self.stable_for))

    def due(self, now: float) -> list[bytes]:
        """Return the candidates that are worth another look."""
        ready: list[bytes] = []
        for candidates in (self._waiting, self._held):
            for relpath, candidate in candidates.items():
                if now < candidate.due:
                    break
                ready.append(relpath)
        return ready

    def next_due(self) -> float | None:
        """Return when the first candidate is worth a look, or None without candidates."""
        firsts = (next(iter(candidates.values()), None) for candidates in (self._waiting, self._held))
        return min((first.due for first in firsts if first is not None), default=None)
