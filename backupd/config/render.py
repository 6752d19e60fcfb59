"""Output of configurations: the effective one, a commented example, and the JSON Schema."""

import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, get_args, get_origin
from urllib.parse import unquote_plus, urljoin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from backupd.config.models import DESTINATION_MODELS, Config, DestinationConfig, models_of
from backupd.config.paths import Table, subtables
from backupd.config.toml import heading, setting
from backupd.config.types import may_be_a_secret, may_hold_a_secret, names_a_credential

HIDDEN: Final = "***"


def effective_toml(config: Config) -> str:
    """Return a configuration as TOML that `load` reads back; values that look like credentials are hidden."""
    data = config.model_dump(mode="json", exclude_none=True)
    # each by its own model: the one in common lacks the keys of the kind
    data["destination"] = {
        name: destination.model_dump(mode="json", exclude_none=True)
        for name, destination in config.destination.items()
    }
    hides: dict[str, Callable[[str, str], bool]] = {
        "headers": _may_hold_a_secret,
        "fields": lambda name, _: names_a_credential(name),
    }
    for destination in data["destination"].values():
        for key, is_hidden in hides.items():
            for name, value in destination.get(key, {}).items():
                destination[key][name] = HIDDEN if is_hidden(name, value) else value
        auth = destination.get("auth", {})
        for table, key in ((destination, "url"), (destination, "query_url"), (auth, "token_url")):
            if key in table:
                table[key] = _without_credentials(table[key])
    if config.heartbeat.ping_url:
        data["heartbeat"]["ping_url"] = urljoin(config.heartbeat.ping_url, f"/{HIDDEN}")
    return "\n".join(_lines(config, data, ())).lstrip("\n") + "\n"


def example_toml() -> str:
    """Return a configuration with all keys; those to fill in are set, the others are comments."""
    return "\n".join((_PREFACE, *_example_lines(Config, ()))) + "\n"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, for completion and validation in editors."""
    schema = Config.model_json_schema()
    tables = schema["$defs"]
    _add_kinds(schema, tables)
    _describe(Config, schema, tables)
    return {"$schema": _SCHEMA_DIALECT, **schema, "title": "Configuration of backupd"}


# The effective configuration

_PARAMETER: Final = re.compile(r"(?<=[?&])(?P<name>[^=&#]+)(?:=(?P<value>[^&#]*))?")


def _without_credentials(url: str) -> str:
    def hidden(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if value is None:
            return HIDDEN if any(map(may_be_a_secret, _constants(unquote_plus(name)))) else name
        return f"{name}={HIDDEN if _may_hold_a_secret(name, unquote_plus(value)) else value}"

    return _PARAMETER.sub(hidden, url)


def _may_hold_a_secret(name: str, template: str) -> bool:
    return may_hold_a_secret(name, _constants(template))


def _constants(template: str) -> list[str]:
    return re.split(r"\{\w+\}", template)


def _lines(config: BaseModel, data: Table, place: tuple[str, ...]) -> Iterator[str]:
    inner = list(subtables(type(config)))
    if place:
        yield "\n" + heading(*place)
    for key, value in data.items():
        if key not in {name for name, _, _ in inner}:
            yield setting(key, value)
    for key, _, named in inner:
        value = getattr(config, key)
        if not named:
            yield from _lines(value, data[key], (*place, key))
            continue
        for name, each in value.items():
            yield from _lines(each, data[key][name], (*place, key, name))


# The example

_EXAMPLE_NAMES: Final = {"drop": "switches", "destination": "vault", "notify": "ops"}
_TO_FILL_IN: Final = frozenset({"path", "url", "ca", "cert", "key"})
_PREFACE: Final = (
    '# Configuration of backupd. Keys after a "#" show their defaults, or an example\n'
    '# if there is none. Durations are written "30s", "5m", "26h"; sizes "20MB", "1GiB".'
)


def _example_lines(model: type[BaseModel], place: tuple[str, ...]) -> Iterator[str]:
    inner = {key: (table, named) for key, table, named in subtables(model)}
    given = _defaults(model)
    to_fill_in = _TO_FILL_IN if len(place) == 2 else frozenset()
    # a stable sort: the keys to fill in come first
    for key, field in sorted(model.model_fields.items(), key=lambda each: each[0] not in to_fill_in):
        if key not in inner:
            yield _description(field)
            yield _setting(key, field, given, is_set=key in to_fill_in)
    for key, (table, named) in inner.items():
        deeper = (*place, key, _EXAMPLE_NAMES[key]) if named else (*place, key)
        yield _description(model.model_fields[key])
        is_optional = named and not model.model_fields[key].is_required()
        yield ("#" if is_optional else "") + heading(*deeper)
        yield from _example_lines(models_of(table)[0], deeper)


def _description(field: FieldInfo) -> str:
    lines = ["", f"# {field.description}"]
    if get_origin(field.annotation) is Literal:
        lines.append(f"# One of {', '.join(get_args(field.annotation))}.")
    return "\n".join(lines)


def _setting(key: str, field: FieldInfo, given: Table, *, is_set: bool) -> str:
    shown = given.get(key) if not field.examples else field.examples[0]
    text = setting(key, shown)
    return text if is_set else textwrap.indent(text, "#")


# The JSON Schema

_SCHEMA_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def _add_kinds(schema: Table, tables: dict[str, Table]) -> None:
    """Put the model of each kind of destination in place of the one that all have in common."""
    del tables[DestinationConfig.__name__]
    kinds = []
    for kind, model in DESTINATION_MODELS.items():
        table = model.model_json_schema()
        tables |= {**table.pop("$defs", {}), model.__name__: table}
        table["properties"]["kind"]["const"] = kind
        kinds.append({"$ref": f"#/$defs/{model.__name__}"})
    named = schema["properties"]["destination"]["patternProperties"]
    for pattern in named:
        named[pattern] = kinds[0] if len(kinds) == 1 else {"oneOf": kinds}


def _describe(model: type[BaseModel], schema: Table, tables: dict[str, Table]) -> None:
    """Add descriptions to a schema, write defaults as in TOML, and remove null, which TOML does not have."""
    inner = {key: table for key, table, _ in subtables(model)}
    given = _defaults(model)
    schema.pop("title", None)
    for key, entry in schema["properties"].items():
        entry["description"] = model.model_fields[key].description
        _without_null(entry)
        entry.pop("title", None)
        entry.pop("default", None)
        if "patternProperties" in entry:
            entry["additionalProperties"] = False
        if key in inner:
            for each in models_of(inner[key]):
                _describe(each, tables[each.__name__], tables)
        elif key in given:
            entry["default"] = given[key]


def _without_null(entry: Table) -> None:
    """Replace "this or null" by "this": in TOML, the key is left out instead."""
    if "anyOf" in entry:
        kind, _ = entry.pop("anyOf")
        entry.update(kind)


def _defaults(model: type[BaseModel]) -> Table:
    """Return the defaults of a model as they are written in TOML, without the keys that have none."""
    return model.model_construct().model_dump(mode="json", exclude_none=True)
