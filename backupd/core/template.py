"""Texts with placeholders, such as `Config backup {name}`."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

_PIECE = re.compile(r"(?P<doubled>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])|(?P<text>[^{}]+)")


class TemplateError(ValueError):
    """A text isn't a template; says where in lower case."""


@dataclass(frozen=True, slots=True)
class _Placeholder:
    """The place of the value called `name`."""

    name: str


def _unchanged(value: str) -> str:
    return value


@dataclass(frozen=True, slots=True)
class Template:
    """A text whose `{name}` placeholders are filled in later; `{{` and `}}` stand for single braces.

    There are no formats, conversions or attributes: a value is put in as it is.
    """

    parts: tuple[str | _Placeholder, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the template that `text` spells, or raise `TemplateError`."""
        return cls(tuple(_parts(text)))

    @property
    def names(self) -> frozenset[str]:
        """The names of all placeholders."""
        return frozenset(part.name for part in self.parts if isinstance(part, _Placeholder))

    def render(self, values: Mapping[str, str], escape: Callable[[str], str] = _unchanged) -> str:
        """Return the text with each placeholder's value, escaped, in its place.

        Only values are escaped, never the text around them. A name without a value is a `KeyError`.
        """
        return "".join(part if isinstance(part, str) else escape(values[part.name]) for part in self.parts)


def _parts(text: str) -> Iterator[str | _Placeholder]:
    for piece in _PIECE.finditer(text):
        match piece.lastgroup:
            case "text":
                yield piece.group()
            case "doubled":
                yield piece.group()[0]
            case "name":
                yield _placeholder(piece.group("name"), piece.start())
            case _:
                raise TemplateError(
                    f'unmatched "{piece.group()}" at character {piece.start() + 1}; '
                    'write "{{" and "}}" for braces'
                )


def _placeholder(name: str, start: int) -> _Placeholder:
    if not name.isidentifier():
        raise TemplateError(
            f'expected a plain name in the braces at character {start + 1}, such as "{{name}}"'
        )
    return _Placeholder(name)
