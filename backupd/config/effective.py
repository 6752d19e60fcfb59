"""The configuration as it is in effect, written out."""

import re
from collections.abc import Iterator
from typing import Final

from pydantic import BaseModel

from backupd.config.models import Config
from backupd.config.places import Table, subtables
from backupd.config.values import names_a_credential
from backupd.config.writing import heading, setting

HIDDEN: Final = "***"

_QUERY_VALUE: Final = re.compile(r"(?<=[?&])(?P<name>[^=&]*)=[^&]*")


def as_toml(config: Config) -> str:
    """Return `config` as TOML that `load` reads back; what looks like a credential is hidden."""
    data = config.model_dump(mode="json", exclude_none=True)
    for destination in data["destination"].values():
        for key in ("headers", "fields"):
            destination[key] = {name: _hidden(name, value) for name, value in destination[key].items()}
        auth = destination["auth"]
        for table, key in ((destination, "url"), (destination, "query_url"), (auth, "token_url")):
            if key in table:
                table[key] = _without_credentials(table[key])
    return "\n".join(_lines(Config, data, ())).lstrip("\n") + "\n"


def _without_credentials(url: str) -> str:
    return _QUERY_VALUE.sub(
        lambda found: f"{found['name']}={_hidden(found['name'], found.group().partition('=')[2])}", url
    )


def _hidden(name: str, value: str) -> str:
    return HIDDEN if names_a_credential(name) else value


def _lines(model: type[BaseModel], data: Table, place: tuple[str, ...]) -> Iterator[str]:
    inner = list(subtables(model))
    if place:
        yield "\n" + heading(*place)
    for key, value in data.items():
        if key not in {name for name, _, _ in inner}:
            yield setting(key, value)
    for key, table, named in inner:
        if not named:
            yield from _lines(table, data[key], (*place, key))
            continue
        for name, each in data[key].items():
            yield from _lines(table, each, (*place, key, name))
