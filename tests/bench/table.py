"""The results of the bench: rows of columns with goals, and their output as text and JSON."""

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
    """A row could not be measured: an archive was not delivered, or a program failed."""


@dataclass
class Column:
    """The samples of one program, or the reason why there are none."""

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
class Goal:
    """A figure and its goal; without a figure the goal is not checked."""

    text: str
    value: float | None
    at_most: float | None = None
    at_least: float | None = None
    checked: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None or not self.checked:
            return None
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.at_least is None or self.value >= self.at_least

    def __str__(self) -> str:
        value = "none" if self.value is None else f"{self.value:.4g}"
        bound = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        return f"{self.text}: {value}, goal {bound}: {MET[self.met]}"


MET = {True: "met", False: "NOT MET", None: "not checked"}


@dataclass
class Row:
    """A piece of work, with the figures of each program."""

    key: str
    work: str
    columns: list[Column]
    goals: list[Goal]
    notes: list[str] = field(default_factory=list)
    broken: str | None = None

    @property
    def met(self) -> bool | None:
        verdicts = {goal.met for goal in self.goals}
        return False if self.broken or False in verdicts else None if None in verdicts else True

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.columns), default=0)
        lines = [f"{self.key}  {self.work}"]
        lines += [f"      {c.name:{width}} {c}" for c in self.columns]
        lines += [f"      -> {goal}" for goal in self.goals]
        lines += [f"      ({note})" for note in self.notes]
        lines += [f"      BROKEN: {self.broken}"] if self.broken else []
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return the row in types of JSON."""
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
            "goals": [
                {
                    "figure": c.text,
                    "value": c.value,
                    "at_most": c.at_most,
                    "at_least": c.at_least,
                    "met": c.met,
                }
                for c in self.goals
            ],
            "met": self.met,
            "notes": self.notes,
            "broken": self.broken,
        }


Figures = Mapping[str, float]
"""The figures of one run, by unit."""

Competitor = Callable[[], Figures] | str
"""A function that runs a program once, or the reason to skip the program."""


class Race:
    """Runs programs in turn, so that a disturbance of the machine affects all of them."""

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
        """Return a column for each program."""
        return [
            Column(name, unit, [f[unit] for f in self._results[name] if unit in f], self._skipped.get(name))
            for name in self._names
        ]

    def median(self, name: str, unit: str) -> float | None:
        """Return the median of a program, or None if it did not run."""
        samples = [figures[unit] for figures in self._results[name] if unit in figures]
        return statistics.median(samples) if samples else None

    def ratio(self, unit: str, name: str, to: str) -> float | None:
        """Return the ratio of two medians, or None if a program did not run."""
        one, other = self.median(name, unit), self.median(to, unit)
        return None if one is None or not other else one / other


def machine() -> dict[str, Any]:
    """Return the properties of the machine that the figures depend on."""
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
