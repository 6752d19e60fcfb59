"""Whether an archive's size is like those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KEPT = 10
"""Sizes that are remembered of a device, its last ones."""

_ENOUGH = 3
"""Sizes without which nothing can be said of the next one."""


@dataclass(frozen=True, slots=True)
class Unusual:
    """How a size differs: `change` is a fraction of the median, -0.5 for half of it."""

    median: int
    change: float


def median(sizes: Sequence[int]) -> int:
    """Return the middle one of some sizes, or what lies between the two in the middle."""
    ordered = sorted(sizes)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def change_of(size: int, usual: int) -> float:
    """Return by how much a size differs from the usual one, as a fraction of that."""
    return (size - usual) / max(usual, 1)


def unusual(size: int, before: Sequence[int], alarm: float) -> Unusual | None:
    """Tell whether a size differs from the median of those before by the fraction `alarm` or more."""
    if len(before) < _ENOUGH:
        return None
    usual = median(before)
    change = change_of(size, usual)
    return Unusual(usual, change) if abs(change) >= alarm else None
