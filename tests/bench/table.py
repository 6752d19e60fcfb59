"""What was measured: rows of columns, the claims on them, and how they are shown."""

from __future__ import annotations

import os
import platform
import ssl
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import backupd


class BrokenError(Exception):
    """A row could not be measured as meant: an archive was not delivered, a program failed."""


@dataclass
class Column:
    """The samples of one competitor, or why there are none."""

    name: str
    unit: str
    samples: list[float] = field(default_factory=list)
    skipped: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def __str__(self) -> str:
        if self.median is None:
            return f"skipped: {self.skipped}"
        low, high = min(self.samples), max(self.samples)
        return f"{self.median:10.4g} {self.unit:8} ({low:.4g}..{high:.4g}, n={len(self.samples)})"


@dataclass
class Claim:
    """A figure and its bound; without a figure there is nothing to judge."""

    text: str
    value: float | None
    at_most: float | None = None
    at_least: float | None = None
    judged: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None or not self.judged:
            return None
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.at_least is None or self.value >= self.at_least

    def __str__(self) -> str:
        value = "none" if self.value is None else f"{self.value:.4g}"
        bound = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        return f"{self.text}: {value}, wanted {bound}: {MET[self.met]}"


MET = {True: "met", False: "NOT MET", None: "not judged"}


@dataclass
class Row:
    """One piece of work."""

    key: str
    work: str
    columns: list[Column]
    claims: list[Claim]
    notes: list[str] = field(default_factory=list)
    broken: str | None = None

    @property
    def met(self) -> bool | None:
        verdicts = {claim.met for claim in self.claims}
        return False if self.broken or False in verdicts else None if None in verdicts else True

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.columns), default=0)
        lines = [f"{self.key}  {self.work}"]
        lines += [f"      {c.name:{width}} {c}" for c in self.columns]
        lines += [f"      -> {claim}" for claim in self.claims]
        lines += [f"      ({note})" for note in self.notes]
        lines += [f"      BROKEN: {self.broken}"] if self.broken else []
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return all of it, in plain types."""
        return {
            "row": self.key,
            "work": self.work,
            "columns": [
                {
                    "name": c.name,
                    "unit": c.unit,
                    "samples": c.samples,
                    "median": c.median,
                    "min": min(c.samples, default=None),
                    "max": max(c.samples, default=None),
                    "skipped": c.skipped,
                }
                for c in self.columns
            ],
            "wanted": [
                {
                    "figure": c.text,
                    "value": c.value,
                    "at_most": c.at_most,
                    "at_least": c.at_least,
                    "met": c.met,
                }
                for c in self.claims
            ],
            "met": self.met,
            "notes": self.notes,
            "broken": self.broken,
        }


Figures = Mapping[str, float]
"""What one run of a competitor yields, by unit."""

Competitor = Callable[[], Figures] | str
"""Runs once; or says why it can't."""


class Race:
    """Runs competitors in turn, so that what disturbs the machine disturbs all of them."""

    def __init__(self, runs: int, competitors: Mapping[str, Competitor]) -> None:
        self._skipped = {name: c for name, c in competitors.items() if isinstance(c, str)}
        self._names = list(competitors)
        self._results: dict[str, list[Figures]] = {name: [] for name in competitors}
        for _ in range(runs):
            for name, competitor in competitors.items():
                if not isinstance(competitor, str):
                    os.sync()
                    self._results[name].append(competitor())

    def columns(self, unit: str) -> list[Column]:
        """Return a column for each competitor."""
        return [
            Column(name, unit, [f[unit] for f in self._results[name] if unit in f], self._skipped.get(name))
            for name in self._names
        ]

    def median(self, name: str, unit: str) -> float | None:
        """Return a competitor's median, if it ran."""
        samples = [figures[unit] for figures in self._results[name] if unit in figures]
        return statistics.median(samples) if samples else None

    def ratio(self, unit: str, name: str, to: str) -> float | None:
        """Return the ratio of two medians, if both ran."""
        one, other = self.median(name, unit), self.median(to, unit)
        return None if one is None or not other else one / other


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl of python": ssl.OPENSSL_VERSION,
        "backupd": backupd.__version__,
        "nginx": _version("nginx", "-v"),
        "curl": _version("curl", "--version"),
        "openssl": _version("openssl", "version"),
        "rclone": _version("rclone", "version"),
    }


def _version(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return " ".join((done.stdout or done.stderr).partition("\n")[0].split()[:3])
