"""From a file and the environment to a configuration."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from backupd.config.faults import Place
from backupd.config.models import Config
from backupd.config.places import Table, shown, table_at
from backupd.config.validation import Finding, validate
from backupd.core.errors import ConfigError

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
    overrides = _overrides()
    _override(data, overrides)
    _find_credentials(data)
    data.setdefault("state_dir", _default_state_dir())
    match validate(data):
        case Config() as config:
            return config
        case findings:
            raise InvalidConfigError(path, [_line(finding, overrides) for finding in findings])


def _line(finding: Finding, overrides: Mapping[Place, str]) -> str:
    where = shown(finding.place)
    if finding.place in overrides:
        from backupd.config.environment import variable  # noqa: PLC0415  (imported already, by `_overrides`)

        where = variable(finding.place)
    return f"{where}: {finding.text}"


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


def _overrides() -> Mapping[Place, str]:
    if not any(name.upper().startswith("BACKUPD_") for name in os.environ):
        return {}
    from backupd.config import environment  # noqa: PLC0415  (30 ms that few starts need)

    return environment.settings()


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
