"""The settings that the environment may give: the top-level scalars and the log's."""

from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from backupd.config.faults import Place
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
