"""What a look at a configuration and at all that it names brought."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from backupd.config.problem import Problem


@dataclass(frozen=True, slots=True)
class Examination:
    """The problems, and when each destination's client certificate expires, in seconds since the epoch."""

    problems: tuple[Problem, ...]
    expires: Mapping[str, float]

    @property
    def fatal(self) -> tuple[Problem, ...]:
        """Return the problems that keep the configuration from being run."""
        return tuple(problem for problem in self.problems if problem.fatal and problem.stops)


Examine = Callable[[], Examination]
"""Looks at the configuration file as it is now; raises ConfigError where it can't be read or used."""
