"""The schema that editors complete and check a configuration by."""

from typing import Any, Final

from pydantic import BaseModel

from backupd.config.models import Config
from backupd.config.places import Table, subtables

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
