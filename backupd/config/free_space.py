"""How much of a filesystem has to be free: "5%", "2GiB"."""

import re
from typing import Annotated, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from backupd.config.faults import expected
from backupd.config.quantities import SIZE_PATTERN, format_size, parse_size
from backupd.core.keeping import MinFree

_PERCENT: Final = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,3})?)%")
_A_SPACE: Final = 'a size such as "2GiB", or a percentage such as "5%"'


def _to_space(value: object) -> MinFree:
    if isinstance(value, MinFree):
        return value
    if not isinstance(value, str):
        raise expected(_A_SPACE)
    if match := _PERCENT.fullmatch(value):
        space = MinFree(percent=float(match[1]))
    else:
        try:
            space = MinFree(parse_size(value))
        except ValueError:
            raise expected(_A_SPACE) from None
    if space == MinFree():
        raise expected("more than nothing")
    return space


def _written(space: MinFree) -> str:
    return f"{space.percent:g}%" if space.percent else format_size(space.size)


FreeSpace = Annotated[
    MinFree,
    BeforeValidator(_to_space),
    PlainSerializer(_written, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": f"{SIZE_PATTERN}|^{_PERCENT.pattern}$"}),
]
"""A size, or a percentage of the filesystem below 100."""
