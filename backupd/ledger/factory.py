"""Opens the ledger of a configuration; the only module that chooses an adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from backupd.config.models import Config
from backupd.ledger.history import History
from backupd.ledger.port import OpenedLedger
from backupd.ledger.sqlite.deliveries import open_for_daemon
from backupd.ledger.sqlite.queries import open_queries


def open_ledger(config: Config, on_progress: Callable[[], None]) -> AbstractContextManager[OpenedLedger]:
    """Open the ledger for a daemon until the end of a `with` block; raises LedgerError if that fails.

    A damaged ledger is replaced by a new one. `on_progress` is called every few seconds at least while the
    ledger is checked or migrated.
    """
    return open_for_daemon(config.state_dir, on_progress)


def open_history(config: Config) -> History:
    """Open the ledger for a command; raises LedgerError if it is missing or can't be read."""
    return open_queries(config.state_dir)
