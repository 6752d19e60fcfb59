"""Runs the tests of this directory on each adapter of the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.ledger.history import History
from backupd.ledger.port import Ledger
from tests.contract.bench import ADAPTERS, Bench


@pytest.fixture(params=list(ADAPTERS.values()), ids=list(ADAPTERS))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    yield from request.param(tmp_path)


@pytest.fixture
def ledger(bench: Bench) -> Ledger:
    return bench.ledger


@pytest.fixture
def history(bench: Bench) -> History:
    return bench.history()
