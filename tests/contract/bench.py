"""A ledger under test: opened again as after a crash, by another host, or by a command."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from backupd.ledger.history import History
from backupd.ledger.port import Ledger
from backupd.ledger.sqlite.connection import open_for_reading, open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.ledger.sqlite.queries import LedgerQueries


class Bench(ABC):
    """A ledger on which several hosts may run a daemon; `ledger` is that of the first host."""

    def __init__(self) -> None:
        self.closing = ExitStack()
        self.ledger = self.open("one")

    def crash(self) -> Ledger:
        """Return the ledger as the next daemon on the first host opens it; the session before is over."""
        self.ledger = self.open("one")
        return self.ledger

    def another_host(self) -> Ledger:
        """Return the ledger as the daemon on a second host opens it, while that on the first one runs."""
        return self.open("two")

    @abstractmethod
    def open(self, host: str) -> Ledger:
        """Return the ledger in a new session of a host, which ends the earlier ones of this host."""

    @abstractmethod
    def history(self) -> History:
        """Return the ledger as a command opens it."""


class SqliteBench(Bench):
    """A ledger in a file."""

    def __init__(self, base: Path) -> None:
        self._base = base
        super().__init__()

    def open(self, host: str) -> Ledger:
        """See `Bench.open`."""
        return self.closing.enter_context(closing(SqliteLedger(open_ledger(self._base).connection, host)))

    def history(self) -> History:
        """See `Bench.history`."""
        return self.closing.enter_context(closing(LedgerQueries(open_for_reading(self._base))))


def _sqlite(base: Path) -> Iterator[Bench]:
    bench = SqliteBench(base)
    with bench.closing:
        yield bench


ADAPTERS: dict[str, Callable[[Path], Iterator[Bench]]] = {"sqlite": _sqlite}
"""Each adapter of the ledger with a function that yields a bench for a test, in an empty directory."""
