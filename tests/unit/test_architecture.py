"""docs/architecture.md names modules and functions that exist, and SQL statements name their columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import DOCS

ROOT = DOCS.parent
PAGE = (DOCS / "architecture.md").read_text("utf-8")
STEPS = [line.split("|")[2:4] for line in PAGE.partition("## Threads")[0].splitlines() if ".py` |" in line]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([a-z_/0-9]+/[a-z_0-9]+\.(?:py|toml))`", PAGE))))
def test_each_file_on_the_page_exists(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "backupd" / path).exists()


@pytest.mark.parametrize(
    "package",
    ["config", "dropfolder", "ledger", "upload", "telemetry", "intake", "delivery", "page", "daemon"],
)
def test_the_layout_names_each_module_of_a_package(package: str) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{package}/` |"))
    modules = {path.stem for path in (ROOT / "backupd" / package).glob("*.py")} - {"__init__"}

    assert modules - set(re.findall(r"`([a-z0-9_]+)`", row)) == set()


@pytest.mark.parametrize(("modules", "functions"), STEPS, ids=[functions.strip() for _, functions in STEPS])
def test_each_function_on_the_path_of_an_archive_exists(modules: str, functions: str) -> None:
    paths = re.findall(r"`([a-z_/0-9]+\.py)`", modules)
    source = "\n".join((ROOT / "backupd" / path).read_text("utf-8") for path in paths)
    names = ".".join(re.findall(r"`([A-Za-z_.]+)`", functions)).split(".")
    missing = [name for name in names if not re.search(rf"\b(def|class) {name}\b", source)]

    assert names
    assert not missing


@pytest.mark.parametrize("path", sorted((ROOT / "backupd/ledger").rglob("*.py")), ids=lambda path: path.stem)
def test_each_statement_names_its_columns(path: Path) -> None:
    """An earlier version of the program keeps working with a table that has got another column."""
    source = path.read_text("utf-8")

    assert not re.findall(r"INTO \w+ (?:VALUES|SELECT)|SELECT (?:\w+\.)?\*", source)
