"""Whose turn it is to be examined: a few archives at a time, so that none keeps the others waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field

from backupd.core.inspection import Finding
from backupd.core.model import Digest
from backupd.intake.found import Found
from backupd.ledger.port import Sighting

_AT_ONCE = 4
"""Archives that take turns, so that a large one does not keep the others waiting."""

_LARGE = 64 * 1024 * 1024
"""Bytes of an archive that takes its time; one turn is kept for those that do not."""

Steps = Generator[None, None, Found | None]


@dataclass(slots=True, eq=False)
class Case:
    """One content under examination; what was found out about it need not be found out again."""

    sighting: Sighting
    since: float
    inspected: bool = False
    damage: Finding | None = None
    digests: dict[str, Digest] = field(default_factory=dict)
    steps: Steps | None = None
    worked: float = 0.0
    due: float = 0.0
    said: set[str] = field(default_factory=set)
    again: bool = False

    @property
    def is_large(self) -> bool:
        """Whether it takes its time."""
        return self.sighting.fingerprint.size > _LARGE


class Turns:
    """The cases that have a turn, in `active`, and those that wait for one, each kind in its order."""

    def __init__(self) -> None:
        self.active: deque[Case] = deque()
        self._small: dict[bytes, Case] = {}
        self._large: dict[bytes, Case] = {}

    def __bool__(self) -> bool:
        return bool(self.active or self._small or self._large)

    def add(self, case: Case) -> None:
        """Have a case wait for its turn."""
        self._queue_of(case)[case.sighting.relpath] = case

    def drop(self, case: Case) -> None:
        """Forget a case, wherever it is."""
        with suppress(ValueError):
            self.active.remove(case)
        self._queue_of(case).pop(case.sighting.relpath, None)

    def begin(self) -> list[Case]:
        """Give the free turns away, one at least to a large case and never all; return whose they are."""
        begun = []
        while len(self.active) < _AT_ONCE and (queue := self._next()):
            case = queue.pop(next(iter(queue)))
            self.active.append(case)
            begun.append(case)
        return begun

    def _next(self) -> dict[bytes, Case]:
        large = sum(case.is_large for case in self.active)
        if self._large and (not large or (not self._small and large < _AT_ONCE - 1)):
            return self._large
        return self._small

    def _queue_of(self, case: Case) -> dict[bytes, Case]:
        return self._large if case.is_large else self._small
