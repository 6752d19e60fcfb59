"""The schema that editors complete and check a configuration by."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from backupd.config.models import Config
from backupd.config.paths import Table, subtables
from backupd.config.toml import heading, setting
from backupd.config.types import names_a_credential

HIDDEN: Final = "***"

_QUERY_VALUE: Final = re.compile(r"(?<=[?&])(?P<name>[^=&]*)=[^&]*")


def effective_toml(config: Config) -> str:
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


_NAMES: Final = {"drop": "switches", "destination": "vault"}
_TO_FILL_IN: Final = frozenset({"path", "url", "ca", "cert", "key"})
_PREFACE: Final = (
    '# Configuration of backupd. Settings behind a "#" show their defaults, or an example\n'
    '# where there is none. Durations are written "30s", "5m", "26h"; sizes "20MB", "1GiB".'
)


def example_toml() -> str:
    """Return a complete configuration; what must be filled in is set, everything else a comment."""
    return "\n".join((_PREFACE, *_example_lines(Config, ()))) + "\n"


def _example_lines(model: type[BaseModel], place: tuple[str, ...]) -> Iterator[str]:
    inner = {key: (table, named) for key, table, named in subtables(model)}
    given = defaults(model)
    for key, field in model.model_fields.items():
        if key not in inner:
            yield _described(field)
            yield _setting(key, field, given, filled_in=len(place) == 2 and key in _TO_FILL_IN)
    for key, (table, named) in inner.items():
        deeper = (*place, key, _NAMES[key]) if named else (*place, key)
        yield _described(model.model_fields[key])
        yield heading(*deeper)
        yield from _example_lines(table, deeper)


def _described(field: FieldInfo) -> str:
    lines = ["", f"# {field.description}"]
    if get_origin(field.annotation) is Literal:
        lines.append(f"# One of {', '.join(get_args(field.annotation))}.")
    return "\n".join(lines)


def _setting(key: str, field: FieldInfo, given: Table, *, filled_in: bool) -> str:
    shown = given.get(key) if not field.examples else field.examples[0]
    text = setting(key, shown)
    return text if filled_in else textwrap.indent(text, "#")


_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    schema = Config.model_json_schema()
    tables = schema.get("$defs", {})
    _describe(Config, schema, tables)
    return {"$schema": _DIALECT, **schema, "title": "Configuration of backupd"}


def defaults(model: type[BaseModel]) -> Table:
    """Return the defaults of `model` as its file would write them; what has none is left out."""
    return model.model_construct().model_dump(mode="json", exclude_none=True)


def _describe(model: type[BaseModel], schema: Table, tables: dict[str, Table]) -> None:
    """Write defaults as the file does, and leave out what TOML doesn't know."""
    inner = {key: table for key, table, _ in subtables(model)}
    given = defaults(model)
    schema.pop("title", None)
    for key, entry in schema["properties"].items():
        entry["description"] = model.model_fields[key].description
        _without_null(entry)
        entry.pop("title", None)
        entry.pop("default", None)
        if "patternProperties" in entry:
            entry["additionalProperties"] = False
        if key in inner:
            _describe(inner[key], tables[inner[key].__name__], tables)
        elif key in given:
            entry["default"] = given[key]


def _without_null(entry: Table) -> None:
    """Turn "this or null" into "this": a key of a TOML file is left out instead."""
    if "anyOf" in entry:
        kind, _ = entry.pop("anyOf")
        entry.update(kind)
