"""What the campaigns of the long part have in common: the terms that one is given, and what it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Terms:
    """What a campaign is given: a folder, when to end (monotonic), where chance begins, and how much."""

    base: Path
    until: float
    seed: int
    archives: int | None = None
    """How many archives the load is made of; None: as many as there is time for."""

    def go_on(self) -> bool:
        """Tell whether there is time for one more case."""
        return time.monotonic() < self.until


@dataclass(slots=True)
class Report:
    """How a campaign went: cases tried, what broke a promise, and figures worth telling, by name."""

    tried: int = 0
    broken: list[str] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Return how many cases kept the promises."""
        return self.tried - len(self.broken)


Campaign = Callable[[Terms], Report]
