"""docs/destinations.md matches the failure policy, and its configurations can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

import backupd.upload.registry  # noqa: F401 -- registers the kinds of destinations
from backupd.config.load import load
from backupd.core.policy import RULES, Reason, policy_table, reason_of_status
from tests.documents import DOCS, Block, between, blocks

PAGES = sorted(page.name for page in DOCS.glob("*.md"))
CONFIGURATIONS = [(page, block) for page in PAGES for block in blocks(page) if block.language == "toml"]
A_DROP = '[drop.switches]\npath = "/srv/backups/switches"\n'
A_DESTINATION = '[destination.vault]\nurl = "https://vault.example.net/"\n'


def test_the_table_in_the_docs_is_the_generated_one() -> None:
    assert between("destinations.md", "policy") == policy_table(), (
        "put the output of `python -m backupd.core.policy` between the markers of docs/destinations.md"
    )


def test_the_table_has_a_row_for_each_reason_and_a_cell_for_each_column() -> None:
    head, _, *rows = policy_table().splitlines()

    assert len(rows) == len(RULES) == len(Reason)
    assert {row.count(" | ") for row in rows} == {head.count(" | ")}


def test_each_status_is_only_in_the_row_of_its_reason() -> None:
    named: dict[int, str] = {}
    for row in policy_table().splitlines()[2:]:
        causes, reason = (cell.strip() for cell in row.split("|")[1:3])
        named |= {int(cause): reason for cause in causes.split(", ") if cause.isdigit()}

    assert named == {status: f"`{reason_of_status(status)}`" for status in named}
    assert {400, 401, 403, 404, 409, 413, 422, 429} <= set(named)


@pytest.mark.parametrize(
    ("page", "block"), CONFIGURATIONS, ids=[f"{page}: {block.heading}" for page, block in CONFIGURATIONS]
)
def test_every_configuration_in_the_docs_can_be_loaded(tmp_path: Path, page: str, block: Block) -> None:
    path = tmp_path / "backupd.toml"
    text = block.text if "[drop." in block.text else f"{block.text}\n{A_DROP}"
    text = text if "[destination." in block.text else f"{text}\n{A_DESTINATION}"
    path.write_text(text, encoding="utf-8")

    config = load(path)

    assert config.drop
    assert config.destination


def test_the_destinations_page_has_configurations() -> None:
    assert len([page for page, _ in CONFIGURATIONS if page == "destinations.md"]) >= 15
