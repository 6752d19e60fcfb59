"""The recorder, while the ledger can't be written."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from backupd.delivery.disposition import Disposition
from backupd.delivery.recorder import Recorder
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.port import DispositionResult, Ledger
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, a_candidate, a_drop, delivered, finished
from tests.stage import PATIENCE


def test_a_full_queue_keeps_no_stop_waiting(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.enqueue([a_candidate()], ["vault"], NOW)
    (delivery,) = ledger.claim("vault", NOW)
    ledger.close()  # whatever it is asked to record now fails
    with (tmp_path / "log").open("wb") as stream:
        log = EventLog(LineWriter(stream.fileno()))
        recorder = Recorder(ledger, Disposition({}, log), log, lambda _drop, _path: None)
        abandon = threading.Event()
        running = threading.Thread(target=recorder.run, args=(abandon,), daemon=True)
        recorder.submit(finished(delivery, delivered()))
        running.start()
        while not recorder._queue.full():
            recorder.submit(finished(delivery, delivered()))

        stopping = threading.Thread(target=recorder.finish, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
        abandon.set()
        running.join(PATIENCE)
        assert not running.is_alive()
    told = {json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()}
    assert told == {"ledger.failed"}  # and of nothing that it verified


class Stopping(SqliteLedger):
    """A ledger that tells how much was disposed of in one commit, and has the recorder told to stop."""

    commits: list[int]
    stop: Callable[[], None]

    def record_dispositions(
        self, done: Sequence[DispositionResult], still_due: Sequence[int], now: datetime
    ) -> None:
        super().record_dispositions(done, still_due, now)
        self.commits.append(len(done))
        self.stop()


def test_a_stop_is_heard_between_the_pages_of_what_an_earlier_daemon_left(tmp_path: Path) -> None:
    ledger = Stopping(open_ledger(tmp_path).connection)
    ledger.commits = []
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(300)], ["vault"], NOW)
    while claimed := ledger.claim("vault", NOW, limit=300):
        ledger.record([finished(one, delivered()) for one in claimed], NOW)
    (tmp_path / "drop").mkdir()
    folder = DropFolder(str(tmp_path / "drop"))
    with open(os.devnull, "wb") as null:
        log = EventLog(LineWriter(null.fileno()))
        rules = {"switches": a_drop(folder, on_delivered="keep")}
        for stops_at_once in (True, False):
            recorder = Recorder(ledger, Disposition(rules, log), log, lambda _drop, _path: None)
            ledger.stop = recorder.finish if stops_at_once else _when_done(ledger, recorder)
            recorder.run(threading.Event())
            if stops_at_once:
                assert 0 < ledger.count_pending_dispositions() < 300
    assert sum(ledger.commits) == 300
    folder.close()
    ledger.close()


def _when_done(ledger: Ledger, recorder: Recorder) -> Callable[[], None]:
    return lambda: None if ledger.count_pending_dispositions() else recorder.finish()
