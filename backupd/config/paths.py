"""Where a key stands: among the tables of a file, and among the models that they become."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from backupd.config.problems import Place
from backupd.config.toml import bare_or_quoted

Table = dict[str, Any]


def key_path(place: Place) -> str:
    """Return `place` as people read it: `drop.switches.include[2]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{bare_or_quoted(key)}" for key in place)
    return text.removeprefix(".")


def table_at(data: Table, keys: Sequence[str]) -> Table | None:
    """Return the table that `keys` lead to, if they lead to one."""
    here: object = data
    for key in keys:
        here = here.get(key) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else None


def position(data: Table, place: Place) -> tuple[int, ...]:
    """Return what sorts places into the order of the file; missing keys come after those around them."""
    steps: list[int] = []
    here: object = data
    for key in place:
        if isinstance(key, int):
            steps.append(key)
        elif isinstance(here, dict):
            steps.append(list(here).index(key) if key in here else len(here))
            here = here.get(key)
    return tuple(steps)


def subtables(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel], bool]]:
    """Name each key of `model` that holds a table, its model, and whether it holds one per name."""
    for key, field in model.model_fields.items():
        inner: object = (field.annotation, *get_args(field.annotation))[-1]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield key, inner, inner is not field.annotation


def keys_at(model: type[BaseModel], place: Place) -> Mapping[str, object]:
    """Return the keys that the table at `place` may hold, below the table of `model`."""
    if not place:
        return model.model_fields
    for key, inner, named in subtables(model):
        if key == place[0]:
            return keys_at(inner, place[2:] if named else place[1:])
    return {}
