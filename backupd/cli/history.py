"""Open the ledger for the commands that query it."""

from __future__ import annotations

from pathlib import Path

from backupd.config.load import load
from backupd.config.models import Config
from backupd.ledger.sqlite.connection import open_for_reading
from backupd.ledger.sqlite.queries import LedgerQueries


def open_history(config: Path) -> tuple[Config, LedgerQueries]:
    """Return the configuration in a file, and the queries to its ledger.

    Raises ConfigError for an unusable configuration, LedgerError for a missing or unreadable ledger.
    """
    loaded = load(config)
    return loaded, LedgerQueries(open_for_reading(loaded.state_dir))
