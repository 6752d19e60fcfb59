"""The recorder, while the ledger can't be written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from backupd.delivery.disposal import Disposal
from backupd.delivery.recorder import Recorder
from backupd.ledger.database import open_ledger
from backupd.ledger.sqlite import SqliteLedger
from backupd.ops.lines import LineWriter
from backupd.ops.log import EventLog
from tests.factories import NOW, a_sighting, delivered, finished
from tests.stage import PATIENCE


def test_a_full_queue_keeps_no_stop_waiting(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.admit([a_sighting()], ["vault"], NOW)
    (delivery,) = ledger.claim("vault", NOW)
    ledger.close()  # whatever it is asked to record now fails
    with open(os.devnull, "wb") as null:
        log = EventLog(LineWriter(null.fileno()))
        recorder = Recorder(ledger, Disposal({}, log), log, lambda _drop, _path: None)
        abandon = threading.Event()
        running = threading.Thread(target=recorder.run, args=(abandon,), daemon=True)
        recorder.put(finished(delivery, delivered()))
        running.start()
        while not recorder._queue.full():
            recorder.put(finished(delivery, delivered()))

        stopping = threading.Thread(target=recorder.finish, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
        abandon.set()
        running.join(PATIENCE)
        assert not running.is_alive()
