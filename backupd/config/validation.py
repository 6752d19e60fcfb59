"""From plain tables to a configuration, or to all that is wrong with them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from backupd.config.faults import EXPECTED, FAULT, Place, did_you_mean, quoted
from backupd.config.models import Config
from backupd.config.places import Table, keys_at, position, table_at

_STAND_INS: Final[Mapping[str, object]] = {
    "path": "/stand-in",
    "url": "https://stand-in.invalid/",
    "drop": {"stand-in": {"path": "/stand-in"}},
    "destination": {"stand-in": {"url": "https://stand-in.invalid/"}},
}
_ROUNDS: Final = 6
_SECRET: Final = frozenset({"fields", "headers", "key", "key_password_file", "query_url", "token_url", "url"})

_WHAT: Final[Mapping[str, str]] = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "frozen_set_type": "a list",
    "int_type": "a whole number",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "string_pattern_mismatch": 'a name of letters, digits, ".", "_" and "-"',
    "string_type": "a text in quotes",
    "too_short": "at least one",
    "tuple_type": "a list",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault as it is told: the key that it is about, and the sentence."""

    place: Place
    text: str


def validate(data: Table) -> Config | Sequence[Finding]:
    """Return the configuration that `data` holds, or everything that is wrong with it.

    pydantic looks at what lies between values only once each is right by itself. So what is wrong is
    replaced by its default, and the rest looked at again, until nothing new comes up.
    """
    findings: list[Finding] = []
    touched: list[Place] = []
    rest = copy.deepcopy(data)
    for _ in range(_ROUNDS):
        try:
            config = Config.model_validate(rest)
        except ValidationError as error:
            before = tuple(touched)
            for details in error.errors(include_url=False):
                place, *grounds = _places(details)
                if not _overlap(before, (place, *grounds)):
                    findings.append(Finding(place, _sentence(details, place)))
                touched += (place, *grounds)
                _mend(rest, (place, *grounds), details["type"])
        else:
            return config if not findings else _in_order(findings, data)
    return _in_order(findings, data)


def _in_order(findings: Sequence[Finding], data: Table) -> Sequence[Finding]:
    return sorted(findings, key=lambda finding: position(data, finding.place))


def _places(details: ErrorDetails) -> Iterator[Place]:
    """Name the place of a fault, then the other keys that it hangs on."""
    yield tuple(key for key in details["loc"] if key != "[key]")
    context = details.get("ctx", {})
    base = details["loc"][: len(details["loc"]) - context.get("depth", 0)]
    for ground in context.get("rests_on", ()):
        yield base + tuple(ground)


def _overlap(earlier: Sequence[Place], places: Sequence[Place]) -> bool:
    """Tell whether one of `places` is, holds or lies in one that was touched earlier."""
    return any(one[: len(other)] == other[: len(one)] for one in earlier for other in places)


def _mend(data: Table, places: Sequence[Place], kind: str) -> None:
    """Take out what is wrong, so that its default takes its place, or put in what is missing."""
    for place in places:
        keys = [key for key in place if isinstance(key, str)]
        table = table_at(data, keys[:-1])
        if table is None:
            continue
        table.pop(keys[-1], None)
        if keys[-1] in _STAND_INS and kind in {"missing", "too_short"}:
            table[keys[-1]] = copy.deepcopy(_STAND_INS[keys[-1]])


def _sentence(details: ErrorDetails, place: Place) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == FAULT:
        return str(context["text"])
    if kind == "missing":
        return "required, but missing"
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(place[-1]), keys_at(Config, place[:-1]))}"
    return f"expected {_what(kind, context)}{_got(place, details['input'])}"


def _what(kind: str, context: Mapping[str, Any]) -> str:
    match kind:
        case "literal_error":
            return str(context["expected"]).replace("'", '"')
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case _ if kind == EXPECTED:
            return str(context["what"])
        case _:
            return _WHAT.get(kind, f"something else ({kind})")


def _got(place: Place, value: object) -> str:
    """Return `, got …` for what is short and no secret."""
    if _SECRET.intersection(place):
        return ""
    match value:
        case str():
            return f", got {quoted(value)}"
        case bool():
            return f", got {str(value).lower()}"
        case int() | float():
            return f", got {value}"
        case dict():
            return ", got a table"
        case _:
            return ", got a list" if isinstance(value, Sequence) else ", got a date"
