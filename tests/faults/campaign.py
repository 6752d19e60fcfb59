"""The options and the report that all campaigns of the long part share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CampaignOptions:
    """The folder to work in, the deadline (monotonic seconds), the random seed, and the load."""

    base: Path
    deadline: float
    seed: int
    archives: int | None = None
    """Number of archives of the load campaign; None: as many as fit into the time."""

    def has_time(self) -> bool:
        """Return whether there is time for one more case."""
        return time.monotonic() < self.deadline


@dataclass(slots=True)
class Report:
    """The result of a campaign: the number of cases, the broken promises, and figures by name."""

    tried: int = 0
    broken: list[str] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Return how many cases kept the promises."""
        return self.tried - len(self.broken)


Campaign = Callable[[CampaignOptions], Report]
