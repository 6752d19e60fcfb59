"""Which candidates have stayed unchanged for long enough."""

from __future__ import annotations

from dataclasses import dataclass, field

from backupd.core.model import Fingerprint

_SHORTEST_HOLD = 0.5


@dataclass(slots=True)
class _Candidate:
    fingerprint: Fingerprint
    since: float


@dataclass(slots=True)
class StabilityTracker:
    """Remembers when each candidate was first seen as it is now.

    Times are seconds of any monotonic clock; `stable_for` is in the same seconds.
    """

    stable_for: float
    _candidates: dict[bytes, _Candidate] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._candidates)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._candidates

    def look(self, relpath: bytes, fingerprint: Fingerprint, now: float) -> bool:
        """Note how a file looks; return True once it has not changed for `stable_for`, and forget it."""
        known = self._candidates.get(relpath)
        if known is None or known.fingerprint != fingerprint:
            if self.stable_for <= 0:
                self._candidates.pop(relpath, None)
                return True
            self._candidates.pop(relpath, None)  # so that the oldest candidate stays first
            self._candidates[relpath] = _Candidate(fingerprint, now)
            return False
        if now - known.since < self.stable_for:
            return False
        del self._candidates[relpath]
        return True

    def forget(self, relpath: bytes) -> None:
        """Drop a candidate that is gone or no longer eligible."""
        self._candidates.pop(relpath, None)

    def hold(self, relpath: bytes, fingerprint: Fingerprint, now: float) -> None:
        """Let a candidate whose writer is still there wait again, half a second at least."""
        self._candidates.pop(relpath, None)
        self._candidates[relpath] = _Candidate(fingerprint, now + max(_SHORTEST_HOLD - self.stable_for, 0.0))

    def due(self, now: float) -> list[bytes]:
        """Return the candidates that are worth another look."""
        ready: list[bytes] = []
        for relpath, candidate in self._candidates.items():
            if now - candidate.since < self.stable_for:
                break  # in the order of `since`
            ready.append(relpath)
        return ready

    def next_due(self) -> float | None:
        """Return when the oldest candidate is worth a look, or None without candidates."""
        for candidate in self._candidates.values():
            return candidate.since + self.stable_for
        return None
