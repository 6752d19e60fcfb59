"""What is wrong with a configuration: each fault with the place of the key that it is about."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from backupd.config.writing import basic_string

Place = tuple[str | int, ...]

EXPECTED = "expected"
FAULT = "fault"

_LONGEST_QUOTE = 60


@dataclass(frozen=True, slots=True)
class Fault:
    """A sentence on the key at `place`; void if one of the keys in `rests_on` is at fault itself."""

    place: Place
    text: str
    rests_on: tuple[Place, ...] = ()


def expected(what: str) -> PydanticCustomError:
    """Return the error for a value that should have been `what`; the value itself is quoted later."""
    return PydanticCustomError(EXPECTED, "expected {what}", {"what": what})


def refused(text: str) -> PydanticCustomError:
    """Return the error that says `text` and never quotes the value."""
    return _error(text)


def raise_all(title: str, faults: Iterable[Fault]) -> None:
    """Raise all `faults`, if there are any, as one `ValidationError`."""
    errors = [
        InitErrorDetails(
            type=_error(fault.text, len(fault.place), fault.rests_on), loc=fault.place, input=None
        )
        for fault in faults
    ]
    if errors:
        raise ValidationError.from_exception_data(title, errors, hide_input=True)


def _error(text: str, depth: int = 0, rests_on: tuple[Place, ...] = ()) -> PydanticCustomError:
    return PydanticCustomError(FAULT, "{text}", {"text": text, "depth": depth, "rests_on": rests_on})


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
    """Return `; did you mean "…"?` for the nearest of `right`, or nothing."""
    near = get_close_matches(wrong, sorted(right), n=1)
    return f"; did you mean {quoted(near[0])}?" if near else ""


def quoted(text: str) -> str:
    """Return `text` in double quotes, on one line and not too long."""
    if len(text) > _LONGEST_QUOTE:
        text = text[: _LONGEST_QUOTE - 1] + "…"
    return basic_string(text)
