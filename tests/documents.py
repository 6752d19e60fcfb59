"""Read the code blocks of the documentation, so that tests run the very text that a page shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code, and the heading above it."""

    heading: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page, in the order of the page."""
    found: list[Block] = []
    heading, language, lines = "", None, list[str]()
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if language is None and line.startswith("#"):
            heading = line.lstrip("#").strip()
        elif language is None and line.startswith("```"):
            language, lines = line.removeprefix("```"), []
        elif language is not None and line == "```":
            found.append(Block(heading, language, "\n".join(lines) + "\n"))
            language = None
        elif language is not None:
            lines.append(line)
    return found


def block(page: str, heading: str, language: str) -> str:
    """Return the text of the only code block in a language under a heading."""
    (found,) = [b.text for b in blocks(page) if b.heading == heading and b.language == language]
    return found


def between(page: str, mark: str) -> str:
    """Return the text between `<!-- mark -->` and `<!-- /mark -->`, without blank lines around it."""
    _, _, rest = (DOCS / page).read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    found, end, _ = rest.partition(f"<!-- /{mark} -->")
    assert end, f"{page} has no <!-- {mark} --> … <!-- /{mark} -->"
    return found.strip("\n") + "\n"
