"""Pictures of a terminal: the screen of a command as HTML, which the browser draws."""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pyte
from pyte.screens import Char

from tests.browser import Visit, shrink, visit

_COLOURS = {
    "default": "#d5d9e0",
    "black": "#5c6370",
    "red": "#f47067",
    "green": "#6bc46d",
    "brown": "#daaa3f",
    "blue": "#6cb6ff",
    "magenta": "#dcbdfb",
    "cyan": "#56d4dd",
    "white": "#ffffff",
}
"""The colours of a terminal by their names in pyte."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ margin: 0; padding: 14px; background: #1b1f27; width: max-content }}
pre {{ margin: 0; font: 13px/1.4 "DejaVu Sans Mono", monospace; color: #d5d9e0 }}
.dim {{ opacity: .6 }}
</style>
<body><pre class="screen">{text}</pre></body></html>
"""

_CELL = 7.83
"""Pixels of a character in this font."""


def draw(base: Path, screen: pyte.Screen, png: Path, command: str) -> None:
    """Write the picture of a screen after a command; `base` is an empty folder to work in."""
    lines = [f"$ {html.escape(command)}", *_lines(screen)]
    page = base / f"{png.stem}.html"
    page.write_text(_PAGE.format(title=html.escape(command), text="\n".join(lines)), "utf-8")
    width = int(screen.columns * _CELL) + 30
    work = base / png.stem
    work.mkdir()
    visit(work, Visit(page.as_uri(), width, "dark", screenshot=str(png), until=".screen"))
    shrink(png)


def _lines(screen: pyte.Screen) -> Iterator[str]:
    """Yield the lines of a screen as HTML, without the empty ones at its end."""
    last = max((n for n, text in enumerate(screen.display) if text.strip()), default=0)
    for number in range(last + 1):
        row = [screen.buffer[number][column] for column in range(screen.columns)]
        while row and not row[-1].data.strip():
            row.pop()
        yield "".join(_span(style, list(chars)) for style, chars in groupby(row, _style))


def _style(char: Char) -> tuple[str, bool]:
    return char.fg, char.bold


def _span(style: tuple[str, bool], chars: list[Char]) -> str:
    text = html.escape("".join(char.data for char in chars))
    colour, bold = style
    weight = "; font-weight: bold" if bold else ""
    return f'<span style="color: {_COLOURS.get(colour, f"#{colour}")}{weight}">{text}</span>'
