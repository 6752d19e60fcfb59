"""The problems of a configuration: `ConfigFault` for its values, `FileProblem` for the files that it names.

A fault is found in the TOML alone: an unknown key, a bad value, or values that contradict each other. It
prevents the configuration from being loaded. A file problem is found on this host after loading: a
missing folder, an unreadable key, a certificate that expires soon.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic_core import PydanticCustomError

from backupd.config.toml import basic_string

Place = tuple[str | int, ...]
"""The position of a key: the names of the tables that contain it, its own name, and the index in a list."""


@dataclass(frozen=True, slots=True)
class ConfigFault:
    """A fault of the value at `place` in the TOML; `text` is a sentence without the key.

    `rests_on` are the keys that it is about too. The fault is dropped if one of these has a fault itself,
    because it may go away with that.
    """

    place: Place
    text: str
    rests_on: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class FileProblem:
    """A problem of a file or folder that the key `where` names; `hint` is the command or edit that fixes it.

    `fatal` is False for a warning. `prevents_start` is False for an error with which the daemon starts
    nevertheless: it concerns one drop or one destination, and must not stop the others.
    """

    where: str
    message: str
    hint: str
    fatal: bool
    prevents_start: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")


@dataclass(frozen=True, slots=True)
class NamedPath:
    """A file or folder, and the key of the configuration that names it."""

    where: str
    path: Path

    def problem(
        self, text: str, hint: str, *, fatal: bool = True, prevents_start: bool = True
    ) -> FileProblem:
        """Return a problem with a message of the path and `text`."""
        return FileProblem(self.where, f"{self.path} {text}", hint, fatal, prevents_start)


def error_text(error: OSError) -> str:
    """Return the text of an error in lower case."""
    return (error.strerror or "unknown error").lower()


EXPECTED = "expected"
"""The type of pydantic's errors made by `expected`; the text of the fault ends with the value."""

FAULT = "fault"
"""The type of pydantic's errors made by `refused`; the text of the fault does not contain the value."""

_MAX_QUOTED = 60


def expected(value: str) -> PydanticCustomError:
    """Return the error `expected …` with a description of valid values; `, got …` is appended later."""
    return PydanticCustomError(EXPECTED, "expected {value}", {"value": value})


def refused(text: str) -> PydanticCustomError:
    """Return the error with this text, to which the value is not appended."""
    return PydanticCustomError(FAULT, "{text}", {"text": text})


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
    """Return `; did you mean "…"?` with the most similar of the right names, empty if none is similar."""
    near = get_close_matches(wrong, sorted(right), n=1)
    return f"; did you mean {quoted(near[0])}?" if near else ""


def quoted(text: str) -> str:
    """Return a text in double quotes, on one line and cut to 60 characters."""
    if len(text) > _MAX_QUOTED:
        text = text[: _MAX_QUOTED - 1] + "…"
    return basic_string(text)
