"""A commented configuration to begin with, made from the models themselves."""

import textwrap
from collections.abc import Iterator
from typing import Final, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from backupd.config.models import Config
from backupd.config.places import Table, subtables
from backupd.config.schema import defaults
from backupd.config.writing import heading, setting

_NAMES: Final = {"drop": "switches", "destination": "vault"}
_TO_FILL_IN: Final = frozenset({"path", "url", "ca", "cert", "key"})
_PREFACE: Final = (
    '# Configuration of backupd. Settings behind a "#" show their defaults, or an example\n'
    '# where there is none. Durations are written "30s", "5m", "26h"; sizes "20MB", "1GiB".'
)


def example_toml() -> str:
    """Return a complete configuration; what must be filled in is set, everything else a comment."""
    return "\n".join((_PREFACE, *_lines(Config, ()))) + "\n"


def _lines(model: type[BaseModel], place: tuple[str, ...]) -> Iterator[str]:
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
        yield from _lines(table, deeper)


def _described(field: FieldInfo) -> str:
    lines = ["", f"# {field.description}"]
    if get_origin(field.annotation) is Literal:
        lines.append(f"# One of {', '.join(get_args(field.annotation))}.")
    return "\n".join(lines)


def _setting(key: str, field: FieldInfo, given: Table, *, filled_in: bool) -> str:
    shown = given.get(key) if not field.examples else field.examples[0]
    text = setting(key, shown)
    return text if filled_in else textwrap.indent(text, "#")
