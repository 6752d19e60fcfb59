"""Loading a configuration from a TOML file and the environment, with all its faults reported at once."""

import copy
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from backupd.config import rules
from backupd.config.models import DEFAULT_KIND, DESTINATION_MODELS, Config, TableModel
from backupd.config.paths import Table, key_path, keys_at, position, table_at
from backupd.config.problems import EXPECTED, FAULT, ConfigFault, Place, did_you_mean, quoted
from backupd.core.errors import ConfigError

DEFAULT_PATH: Final = Path("/etc/backupd/backupd.toml")


class InvalidConfigError(ConfigError):
    """The configuration has faults; `findings` has one line for each."""

    def __init__(self, path: Path, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        super().__init__(
            "\n".join((f"{path} can't be used:", *findings)),
            "`backupd init` prints a commented configuration, `backupd config schema` its schema",
        )


def load(path: Path = DEFAULT_PATH) -> Config:
    """Return the configuration in a file, overridden by the `BACKUPD_…` environment variables.

    Raise ConfigError if the file can't be read or parsed, InvalidConfigError with all faults of its values.
    """
    data = _parse(path, _read(path))
    overrides = _environment()
    _apply_overrides(data, overrides)
    data.setdefault("state_dir", _default_state_dir())
    match validate(data):
        case Config() as config:
            return config
        case faults:
            raise InvalidConfigError(path, [_fault_line(fault, overrides) for fault in faults])


def validate(data: Table) -> Config | Sequence[ConfigFault]:
    """Return the configuration in parsed TOML, or all its faults in the order of the file.

    The models check each value on its own, then the rules check the values against each other: those that
    are valid, and defaults in place of the others. A fault that may follow from an earlier one is left out.
    """
    faults: list[ConfigFault] = []
    config: Config | None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        faults = [_to_fault(details, data) for details in errors]
        config = _valid_rest(data, faults, errors)
    if config is not None:
        for check in (rules.within_tables, rules.between_tables):
            bad = [place for fault in faults for place in _places(fault)]
            faults += [fault for fault in check(config) if not _are_related(bad, _places(fault))]
        if not faults:
            return config
    return sorted(faults, key=lambda fault: position(data, fault.place))


# The file

_POSITION: Final = re.compile(r" \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")
_CREDENTIAL_LINE: Final = re.compile(
    r"(?P<shown>.*(?:auth|cookie|credential|key|passw|secret|token)[^=]*=\s*|.*://).*", re.IGNORECASE
)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file",
            "`backupd init` prints one to start with; use --config for a file in another place",
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory", "use --config with the path of the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8 text") from None
    except OSError as error:
        reason = (error.strerror or "can't be read").lower()
        raise ConfigError(f"{path}: {reason}", "the daemon's user must be able to read it") from None


def _parse(path: Path, text: str) -> Table:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(path, text, str(error))) from None
    except ValueError:  # Python limits the number of digits
        raise ConfigError(f"{path}: a number has too many digits") from None


def _syntax_error(path: Path, text: str, message: str) -> str:
    lines = text.splitlines() or [""]
    found = _POSITION.search(message)
    if found and found["line"]:
        line, column = int(found["line"]), int(found["column"])
    else:
        line, column = len(lines), len(lines[-1]) + 1
    reason = _POSITION.sub("", message)
    offending = _CREDENTIAL_LINE.sub(r"\g<shown>***", lines[min(line, len(lines)) - 1])
    return f"{path}:{line}:{column}: {reason[:1].lower()}{reason[1:]}\n  {offending.strip()}"


def _default_state_dir() -> str:
    """Return the first of systemd's state directories, or the default."""
    first, _, _ = os.environ.get("STATE_DIRECTORY", "").partition(":")
    return first or str(Config.model_fields["state_dir"].default)


# The environment

_ENV_PREFIX = "BACKUPD_"
_ENV_NESTING = "__"


class _Settings(BaseSettings):
    """The values of the `BACKUPD_…` environment variables as text; `Config` validates them."""

    model_config = SettingsConfigDict(
        env_prefix=_ENV_PREFIX, env_nested_delimiter=_ENV_NESTING, env_ignore_empty=True, extra="ignore"
    )

    state_dir: str | None = None
    shutdown_grace: str | None = None
    heartbeat_every: str | None = None
    certificate_warning: str | None = None
    certificate_critical: str | None = None
    keep_history_for: str | None = None
    on_event_timeout: str | None = None
    log: dict[str, str] | None = None
    heartbeat: dict[str, str] | None = None
    metrics: dict[str, str] | None = None


def _table_variables() -> Iterator[str]:
    """Yield the names of the variables that would set a whole table."""
    for name, field in _Settings.model_fields.items():
        if field.annotation != str | None:
            yield f"{_ENV_PREFIX}{name.upper()}"


def _environment() -> dict[Place, str]:
    """Return the values that environment variables set, by the place of their keys."""
    try:
        given = _Settings().model_dump(exclude_none=True)
    except (SettingsError, ValueError):
        raise ConfigError(
            f"one of {', '.join(_table_variables())}: expected a JSON object with text values",
            f"set {_ENV_PREFIX}LOG__LEVEL, {_ENV_PREFIX}LOG__FORMAT and such instead",
        ) from None
    values: dict[Place, str] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            values |= {(name, key): inner for key, inner in value.items()}
        else:
            values[(name,)] = value
    return values


def _variable(place: Place) -> str:
    """Return the name of the environment variable that sets the key at a place."""
    return _ENV_PREFIX + _ENV_NESTING.join(str(key).upper() for key in place)


def _apply_overrides(data: Table, overrides: Mapping[Place, str]) -> None:
    for place, value in overrides.items():
        *outer, key = map(str, place)
        table = data
        for name in outer:
            table = table.setdefault(name, {})
        if isinstance(table, dict):  # another type of value in the file is reported as a fault later
            table[key] = value


def _fault_line(fault: ConfigFault, overrides: Mapping[Place, str]) -> str:
    where = _variable(fault.place) if fault.place in overrides else key_path(fault.place)
    return f"{where}: {fault.text}"


# Faults

_REQUIRED: Final = {"path": "/missing", "url": "https://missing.invalid/", "url_file": "/missing"}
"""The keys without a default, and the values with which the rules check the rest of their table."""

_KEYS_WITH_SECRETS: Final = frozenset(
    {"fields", "headers", "key", "key_password_file", "ping_url", "query_url", "token_url", "url"}
)


def _valid_rest(data: Table, faults: Sequence[ConfigFault], errors: Sequence[ErrorDetails]) -> Config | None:
    """Return the configuration with defaults for the faulty values; None if a whole table is missing."""
    rest = copy.deepcopy(data)
    for fault, details in zip(faults, errors, strict=True):
        for place in _places(fault):
            keys = [key for key in place if isinstance(key, str)]
            table = table_at(rest, keys[:-1])
            if table is None:
                continue
            table.pop(keys[-1], None)
            if keys[-1] in _REQUIRED and details["type"] != "extra_forbidden":
                table[keys[-1]] = _REQUIRED[keys[-1]]
    try:
        return Config.model_validate(rest)
    except ValidationError:
        return None


def _places(fault: ConfigFault) -> tuple[Place, ...]:
    return fault.place, *fault.rests_on


def _are_related(bad: Sequence[Place], places: Sequence[Place]) -> bool:
    """Return whether one of the places is, contains or is within one of the bad ones."""
    return any(one[: len(other)] == other[: len(one)] for one in bad for other in places)


def _to_fault(details: ErrorDetails, data: Table) -> ConfigFault:
    place = tuple(key for key in details["loc"] if key != "[key]")
    # with a wrong kind, the other keys of the table can't be checked
    rests_on = (place[:2],) if place[:1] == ("destination",) and place[2:] == ("kind",) else ()
    return ConfigFault(place, _fault_text(details, place, data), rests_on)


def _fault_text(details: ErrorDetails, place: Place, data: Table) -> str:
    error_type, context = details["type"], details.get("ctx", {})
    if error_type == FAULT:
        return str(context["text"])
    if error_type == "missing":
        return "required, but missing"
    if error_type == "extra_forbidden":
        return f"unknown key{did_you_mean(str(place[-1]), _keys_at(place[:-1], data))}"
    return f"expected {_expected_value(error_type, context)}{_got_value(place, details['input'])}"


_EXPECTED_VALUE: Final[Mapping[str, str]] = {
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


def _expected_value(error_type: str, context: Mapping[str, Any]) -> str:
    match error_type:
        case "literal_error":
            return str(context["expected"]).replace("'", '"')
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case _ if error_type == EXPECTED:
            return str(context["value"])
        case _:
            return _EXPECTED_VALUE.get(error_type, f"something else ({error_type})")


def _keys_at(place: Place, data: Table) -> Mapping[str, object]:
    """Return the valid keys of the table at a place; those of a destination depend on its kind."""
    if place[:1] != ("destination",) or len(place) < 2:
        return keys_at(Config, place)
    table = table_at(data, [str(key) for key in place[:2]]) or {}
    model: type[TableModel] = DESTINATION_MODELS[table.get("kind", DEFAULT_KIND)]
    return keys_at(model, place[2:])


def _got_value(place: Place, value: object) -> str:
    """Return `, got …` with the value, empty for a key that can contain a secret."""
    if _KEYS_WITH_SECRETS.intersection(place):
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
