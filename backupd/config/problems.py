"""What is wrong with a configuration: each fault with the place of the key that it is about."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic_core import PydanticCustomError

from backupd.config.toml import basic_string


@dataclass(frozen=True, slots=True)
class FileProblem:
    """Something to see to: the key, what is wrong, what to do, and whether something fails before that.

    `stops` tells whether the daemon is not to run with it. It runs with what whoever may write in one drop
    folder can have made, as the others have to go on.
    """

    where: str
    message: str
    hint: str
    fatal: bool
    stops: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")


Place = tuple[str | int, ...]

EXPECTED = "expected"
FAULT = "fault"

_LONGEST_QUOTE = 60


@dataclass(frozen=True, slots=True)
class ConfigFault:
    """A sentence on the key at `place`; void if one of the keys in `rests_on` is at fault itself."""

    place: Place
    text: str
    rests_on: tuple[Place, ...] = ()


def expected(what: str) -> PydanticCustomError:
    """Return the error for a value that should have been `what`; the value itself is quoted later."""
    return PydanticCustomError(EXPECTED, "expected {what}", {"what": what})


def refused(text: str) -> PydanticCustomError:
    """Return the error that says `text` and never quotes the value."""
    return PydanticCustomError(FAULT, "{text}", {"text": text})


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
    """Return `; did you mean "…"?` for the nearest of `right`, or nothing."""
    near = get_close_matches(wrong, sorted(right), n=1)
    return f"; did you mean {quoted(near[0])}?" if near else ""


def quoted(text: str) -> str:
    """Return `text` in double quotes, on one line and not too long."""
    if len(text) > _LONGEST_QUOTE:
        text = text[: _LONGEST_QUOTE - 1] + "…"
    return basic_string(text)
