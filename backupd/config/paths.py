"""Positions of keys: in the tables of a TOML file, and in the models that these are validated with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from backupd.config.problems import Place
from backupd.config.toml import bare_or_quoted

Table = dict[str, Any]


def key_path(place: Place) -> str:
    """Return the path of a key as text, such as `drop.switches.include[2]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{bare_or_quoted(key)}" for key in place)
    return text.removeprefix(".")


def table_at(data: Table, keys: Sequence[str]) -> Table | None:
    """Return the table with this path, or None if there is none."""
    value: object = data
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else None


def position(data: Table, place: Place) -> tuple[int, ...]:
    """Return the sort key of a place in the order of the file; a missing key sorts after its neighbours."""
    indices: list[int] = []
    value: object = data
    for key in place:
        if isinstance(key, int):
            indices.append(key)
        elif isinstance(value, dict):
            indices.append(list(value).index(key) if key in value else len(value))
            value = value.get(key)
    return tuple(indices)


def subtables(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel], bool]]:
    """Yield each key of a model that is a table, its model, and whether it is a table of named tables."""
    for key, field in model.model_fields.items():
        inner: object = (field.annotation, *get_args(field.annotation))[-1]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield key, inner, inner is not field.annotation


def keys_at(model: type[BaseModel], place: Place) -> Mapping[str, object]:
    """Return the valid keys of the table at `place`, which is relative to the table of `model`."""
    if not place:
        return model.model_fields
    for key, inner, named in subtables(model):
        if key == place[0]:
            return keys_at(inner, place[2:] if named else place[1:])
    return {}
