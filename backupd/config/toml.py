"""Writing TOML."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

_WIDTH: Final = 100
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def basic_string(text: str) -> str:
    """Return a text as a TOML basic string; control and other invisible characters are escaped."""
    return "".join(
        each if each.isprintable() else f"\\U{ord(each):08x}" for each in json.dumps(text, ensure_ascii=False)
    )


def bare_or_quoted(key: str) -> str:
    """Return a key as it is written in TOML, in quotes if it needs them."""
    return key if _BARE_KEY.fullmatch(key) else basic_string(key)


def setting(key: str, value: object) -> str:
    """Return the line, or for a long list the lines, that set a key to a value."""
    text = f"{bare_or_quoted(key)} = {_inline(value)}"
    if len(text) > _WIDTH and isinstance(value, Sequence) and not isinstance(value, str):
        return "\n".join((f"{bare_or_quoted(key)} = [", *_wrapped(value), "]"))
    return text


def heading(*keys: str) -> str:
    """Return the header line of a table, such as `[drop.switches]`."""
    return f"[{'.'.join(map(bare_or_quoted, keys))}]"


def _wrapped(items: Sequence[object]) -> Iterator[str]:
    line = ""
    for item in items:
        piece = f"{_inline(item)},"
        if line and len(line) + len(piece) > _WIDTH:
            yield line
            line = ""
        line = f"{line} {piece}" if line else f"    {piece}"
    yield line


def _inline(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case str():
            return basic_string(value)
        case Mapping():
            pairs = ", ".join(f"{bare_or_quoted(key)} = {_inline(each)}" for key, each in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case Sequence():
            return f"[{', '.join(map(_inline, value))}]"
        case _:
            raise TypeError(f"no TOML for {type(value).__name__}")
