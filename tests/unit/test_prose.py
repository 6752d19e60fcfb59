"""Texts for people use plain words, and each name in the code means one thing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "backupd").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "docs/backupd.example.toml", *sorted((ROOT / "backupd").rglob("*.sql"))]
WIDTH = 110
BANNED = re.compile(
    r"\b(told|whoever|whose|anew|mend(s|ed|ing)?|heed(s|ed|ing)?|lies|begun|stands(?!\s+for\b)|for_ever"
    r"|all_the_same|in_force|(say|says|said|saying)_so|(put|puts|set|sets)_aside|(shakes?|shook)_hands)\b".replace(
        "_", r"[\s#]+"
    ),
    re.IGNORECASE,
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts of a file with the line in which each begins; of a module, its strings and comments."""
    source = path.read_text("utf-8")
    if path.suffix != ".py":
        yield 1, source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    comments = [""] * (source.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0] - 1] = token.string
    yield 1, "\n".join(comments)


def test_no_text_has_a_banned_word() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{first + text.count(chr(10), 0, match.start())}: {match[0]!r}"
        for path in (*MODULES, *PAGES, *OTHERS)
        for first, text in texts(path)
        for match in BANNED.finditer(text)
    ]

    assert not found, "\n".join(found)


def test_lines_of_prose_fit_on_a_screen() -> None:
    long = []
    for page in PAGES:
        is_code = False
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
            is_code ^= line.lstrip().startswith("```")
            if not is_code and not line.startswith("|") and len(line) > WIDTH:
                long.append(f"{page.relative_to(ROOT)}:{number}: {len(line)} characters")

    assert not long, "\n".join(long)


def test_each_module_and_each_class_has_a_name_of_its_own() -> None:
    places = defaultdict[str, set[str]](set)
    for path in MODULES:
        module = str(path.relative_to(ROOT))
        if path.stem not in ("__init__", "__main__"):
            places[path.stem].add(module)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(f"{module}:{node.lineno}")
    shared = [f"{name}: {', '.join(sorted(found))}" for name, found in places.items() if len(found) > 1]

    assert not shared, "\n".join(shared)
