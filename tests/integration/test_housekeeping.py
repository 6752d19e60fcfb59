"""Housekeeping with a real ledger: the problems of drops with a filesystem that does not answer."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from backupd.config.files import examine_files
from backupd.config.load import load
from backupd.core.drop_problem import NOT_ANSWERING
from backupd.daemon.assembly import Assembly
from backupd.daemon.housekeeping import Housekeeping
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.stage import Stage


def test_only_drops_that_are_still_configured_are_reported_as_silent(stage: Stage) -> None:
    """A reload examines the files first; the configuration may be edited before it is read again."""
    config = load(stage.configure("https://localhost:1/"))
    stage.state.mkdir()
    ledger = SqliteLedger(open_ledger(stage.state).connection)
    with open(os.devnull, "wb") as null:
        log = EventLog(LineWriter(null.fileno()))
        assembly = Assembly(config, ledger, log, examine_files(config, datetime.now(UTC)))
        housekeeping = Housekeeping(assembly.runtime, log, assembly.device_tracker, assembly.clock)
        housekeeping.take_over({"switches", "removed"})
    assert [(p.drop, p.reason) for p in ledger.problems()] == [("switches", NOT_ANSWERING)]
    ledger.close()
