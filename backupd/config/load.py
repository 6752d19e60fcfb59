"""From a file and the environment to a configuration."""

import copy
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from backupd.config import rules
from backupd.config.models import Config
from backupd.config.paths import Table, key_path, keys_at, position, table_at
from backupd.config.problems import EXPECTED, FAULT, ConfigFault, Place, did_you_mean, quoted
from backupd.core.errors import ConfigError

PREFIX = "BACKUPD_"
_NESTED = "__"


class _Settings(BaseSettings):
    """What `BACKUPD_…` variables say, as they say it; `Config` is what judges the values."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=_NESTED, env_ignore_empty=True, extra="ignore"
    )

    state_dir: str | None = None
    shutdown_grace: str | None = None
    heartbeat_every: str | None = None
    keep_history_for: str | None = None
    log: dict[str, str] | None = None


def settings() -> dict[Place, str]:
    """Return the values of the environment by the place of their keys."""
    try:
        given = _Settings().model_dump(exclude_none=True)
    except (SettingsError, ValueError):
        raise ConfigError(
            f"{PREFIX}LOG: expected a JSON object of texts",
            f"set {PREFIX}LOG__LEVEL and {PREFIX}LOG__FORMAT instead",
        ) from None
    log = given.pop("log", {})
    return {(key,): value for key, value in given.items()} | {("log", key): log[key] for key in log}


def variable(place: Place) -> str:
    """Return the name of the variable that sets the key at `place`."""
    return PREFIX + _NESTED.join(str(key).upper() for key in place)


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


def validate(data: Table) -> Config | Sequence[ConfigFault]:
    """Return the configuration that `data` holds, or everything that is wrong with it, in the file's order.

    The values are checked one by one first, then against each other. A wrong value is replaced by its
    default and the rest is checked again, until a round finds nothing new.
    """
    faults: list[ConfigFault] = []
    touched: list[Place] = []
    rest = copy.deepcopy(data)
    for _ in range(_ROUNDS):
        config, found = _checked(rest)
        if config is not None and not found:
            return config if not faults else _in_order(faults, data)
        before = tuple(touched)
        for fault, kind in found:
            places = (fault.place, *fault.rests_on)
            if not _overlap(before, places):
                faults.append(fault)
            touched += places
            _replace(rest, places, kind)
    return _in_order(faults, data)


def _checked(data: Table) -> tuple[Config | None, Sequence[tuple[ConfigFault, str]]]:
    """Return the configuration, if its values are right one by one, and the faults with pydantic's types."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        return None, [(_fault(details), details["type"]) for details in error.errors(include_url=False)]
    return config, [(fault, FAULT) for fault in rules.check(config)]


def _in_order(faults: Sequence[ConfigFault], data: Table) -> Sequence[ConfigFault]:
    return sorted(faults, key=lambda fault: position(data, fault.place))


def _fault(details: ErrorDetails) -> ConfigFault:
    place = tuple(key for key in details["loc"] if key != "[key]")
    return ConfigFault(place, _sentence(details, place))


def _overlap(earlier: Sequence[Place], places: Sequence[Place]) -> bool:
    """Tell whether one of `places` is, holds or lies in one that was touched earlier."""
    return any(one[: len(other)] == other[: len(one)] for one in earlier for other in places)


def _replace(data: Table, places: Sequence[Place], kind: str) -> None:
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


DEFAULT_PATH: Final = Path("/etc/backupd/backupd.toml")

_TLS_FILES: Final = ("ca", "cert", "key", "key_password_file")
_FILES: Final = (*_TLS_FILES, "proxy_password_file")
_AUTH_FILES: Final = (*_TLS_FILES, "password_file", "token_file", "client_secret_file")
_AT: Final = re.compile(r" \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")
_CREDENTIAL: Final = re.compile(
    r"(?P<shown>.*(?:auth|cookie|credential|key|passw|secret|token)[^=]*=\s*|.*://).*", re.IGNORECASE
)


class InvalidConfigError(ConfigError):
    """A configuration with faults; `findings` holds one line for each."""

    def __init__(self, path: Path, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        super().__init__(
            "\n".join((f"{path} can't be used:", *findings)),
            "`backupd init` prints a commented configuration, `backupd config schema` its schema",
        )


def load(path: Path = DEFAULT_PATH) -> Config:
    """Return the configuration in the file at `path`, overridden by `BACKUPD_…` variables.

    Raise `ConfigError` with everything that is wrong with it.
    """
    data = _parsed(path, _read(path))
    overrides = settings()
    _override(data, overrides)
    _find_credentials(data)
    data.setdefault("state_dir", _default_state_dir())
    match validate(data):
        case Config() as config:
            return config
        case faults:
            raise InvalidConfigError(path, [_line(fault, overrides) for fault in faults])


def _line(fault: ConfigFault, overrides: Mapping[Place, str]) -> str:
    where = variable(fault.place) if fault.place in overrides else key_path(fault.place)
    return f"{where}: {fault.text}"


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file", "`backupd init` prints one to begin with; --config names another"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory", "name the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8 text") from None
    except OSError as error:
        reason = (error.strerror or "can't be read").lower()
        raise ConfigError(f"{path}: {reason}", "the daemon's user must be able to read it") from None


def _parsed(path: Path, text: str) -> Table:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(path, text, str(error))) from None
    except ValueError:  # Python's limit on the digits of a number
        raise ConfigError(f"{path}: a number has too many digits") from None


def _syntax_error(path: Path, text: str, message: str) -> str:
    lines = text.splitlines() or [""]
    found = _AT.search(message)
    if found and found["line"]:
        line, column = int(found["line"]), int(found["column"])
    else:
        line, column = len(lines), len(lines[-1]) + 1
    reason = _AT.sub("", message)
    offending = _CREDENTIAL.sub(r"\g<shown>***", lines[min(line, len(lines)) - 1])
    return f"{path}:{line}:{column}: {reason[:1].lower()}{reason[1:]}\n  {offending.strip()}"


def _override(data: Table, overrides: Mapping[Place, str]) -> None:
    for place, value in overrides.items():
        *outer, key = map(str, place)
        table = data
        for name in outer:
            table = table.setdefault(name, {})
        if isinstance(table, dict):  # else the file holds something else there, and will be told so
            table[key] = value


def _default_state_dir() -> str:
    """Return the first of systemd's state directories, or the usual place."""
    first, _, _ = os.environ.get("STATE_DIRECTORY", "").partition(":")
    return first or str(Config.model_fields["state_dir"].default)


def _find_credentials(data: Table) -> None:
    """Put the full path where a destination names a file in systemd's credentials directory."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return
    for name in table_at(data, ["destination"]) or {}:
        destination = table_at(data, ["destination", name]) or {}
        auth = table_at(data, ["destination", name, "auth"]) or {}
        headers = table_at(data, ["destination", name, "header_files"]) or {}
        for table, keys in ((destination, _FILES), (auth, _AUTH_FILES), (headers, tuple(headers))):
            for key in keys:
                value = table.get(key)
                if isinstance(value, str) and _is_credential(folder, value):
                    table[key] = os.path.join(folder, value)


def _is_credential(folder: str, name: str) -> bool:
    bare = name not in {"", ".", ".."} and not {"/", "\0"} & set(name)
    return bare and os.path.isfile(os.path.join(folder, name))
