"""The recorder with a ledger that cannot be written, and with many pending dispositions."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from backupd.core.model import fingerprint_of
from backupd.delivery.disposition import Disposition
from backupd.delivery.recorder import Recorder
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.port import DispositionResult, Ledger
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, a_candidate, a_claim_result, a_drop, delivered
from tests.stage import TIMEOUT, until


def test_a_full_queue_does_not_delay_a_stop(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.enqueue([a_candidate()], ["vault"], NOW)
    (delivery,) = ledger.claim("vault", NOW)
    ledger.close()  # every call fails from now on
    with (tmp_path / "log").open("wb") as stream:
        log = EventLog(LineWriter(stream.fileno()))
        recorder = Recorder(ledger, Disposition({}, log), log, lambda _drop, _path: None)
        abandon = threading.Event()
        running = threading.Thread(target=recorder.run, args=(abandon,), daemon=True)
        recorder.submit(a_claim_result(delivery, delivered()))
        running.start()
        while not recorder._queue.full():
            recorder.submit(a_claim_result(delivery, delivered()))

        stopping = threading.Thread(target=recorder.finish, daemon=True)
        stopping.start()
        stopping.join(TIMEOUT)
        assert not stopping.is_alive()
        abandon.set()
        running.join(TIMEOUT)
        assert not running.is_alive()
    logged = {json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()}
    assert logged == {"ledger.failed"}  # and no delivery.verified


def test_the_result_of_a_lost_claim_is_neither_logged_nor_disposed_of(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.enqueue([a_candidate(b"lost"), a_candidate(b"held")], ["vault"], NOW)
    lost, held = ledger.claim("vault", NOW, limit=2)
    ledger.release([lost])
    with (tmp_path / "log").open("wb") as stream:
        log = EventLog(LineWriter(stream.fileno()))
        recorder = Recorder(ledger, Disposition({}, log), log, lambda _drop, _path: None)
        for delivery in (lost, held):
            recorder.submit(a_claim_result(delivery, delivered()))
        recorder.finish()
        recorder.run(threading.Event())
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["event"], line["archive"]) for line in logged] == [
        ("delivery.verified", "held"),
        ("archive.delivered", "held"),
    ]
    assert recorder.pop_tally().delivered == 1
    assert [one.archive for one in ledger.pending_dispositions()] == [held.archive]
    ledger.close()


class StoppingLedger(SqliteLedger):
    """Records the number of dispositions in each commit, and calls `stop` after it."""

    commits: list[int]
    stop: Callable[[], None]

    def record_dispositions(
        self,
        done: Sequence[DispositionResult],
        still_due: Sequence[int],
        terms: Mapping[str, int],
        now: datetime,
    ) -> None:
        super().record_dispositions(done, still_due, terms, now)
        self.commits.append(len(done))
        self.stop()


def test_a_stop_takes_effect_between_two_pages_of_pending_dispositions(tmp_path: Path) -> None:
    ledger = StoppingLedger(open_ledger(tmp_path).connection)
    ledger.commits = []
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(300)], ["vault"], NOW)
    while claimed := ledger.claim("vault", NOW, limit=300):
        ledger.record([a_claim_result(one, delivered()) for one in claimed], NOW)
    (tmp_path / "drop").mkdir()
    folder = DropFolder(str(tmp_path / "drop"))
    with open(os.devnull, "wb") as null:
        log = EventLog(LineWriter(null.fileno()))
        drops = {"switches": a_drop(folder, on_delivered="keep")}
        for is_stopped_at_once in (True, False):
            recorder = Recorder(ledger, Disposition(drops, log), log, lambda _drop, _path: None)
            ledger.stop = recorder.finish if is_stopped_at_once else _when_done(ledger, recorder)
            recorder.run(threading.Event())
            if is_stopped_at_once:
                assert 0 < ledger.count_pending_dispositions() < 300
    assert sum(ledger.commits) == 300
    folder.close()
    ledger.close()


def _when_done(ledger: Ledger, recorder: Recorder) -> Callable[[], None]:
    return lambda: None if ledger.count_pending_dispositions() else recorder.finish()


class HangingFolder(DropFolder):
    """A folder with a filesystem that does not answer before `answers` is set."""

    def __init__(self, path: str) -> None:
        self.is_reached, self.answers = threading.Event(), threading.Event()
        super().__init__(path)

    def fileno(self) -> int:
        self.is_reached.set()
        assert self.answers.wait(TIMEOUT)
        return super().fileno()


def test_another_thread_takes_over_from_a_recorder_that_hangs_with_a_drop_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.delivery.recorder.HUNG_AFTER", -1.0)
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    for name in ("hanging", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r1").write_bytes(b"abc")
        fingerprint = fingerprint_of((tmp_path / name / "r1").stat())
        ledger.enqueue([a_candidate(b"r1", drop=name, fingerprint=fingerprint)], ["vault"], NOW)
    claimed = ledger.claim("vault", NOW, limit=2)
    ledger.record([a_claim_result(one, delivered()) for one in claimed], NOW)
    hanging, other = HangingFolder(str(tmp_path / "hanging")), DropFolder(str(tmp_path / "other"))
    with open(os.devnull, "wb") as null:
        log = EventLog(LineWriter(null.fileno()))
        drops = {"hanging": a_drop(hanging, name="hanging"), "other": a_drop(other, name="other")}
        recorder = Recorder(ledger, Disposition(drops, log), log, lambda _drop, _path: None)
        threads = [threading.Thread(target=recorder.run, args=(threading.Event(),)) for _ in range(2)]
        assert not recorder.replace_hung()
        threads[0].start()
        assert hanging.is_reached.wait(TIMEOUT)
        assert recorder.replace_hung()
        threads[1].start()
        until((tmp_path / "other" / "sent" / "r1").exists, "the move in the other drop")
        until(lambda: ledger.count_pending_dispositions() == 1, "its record")
        assert (tmp_path / "hanging" / "r1").exists()

        hanging.answers.set()
        threads[0].join(TIMEOUT)
        assert not threads[0].is_alive()
        until(lambda: ledger.count_pending_dispositions() == 0, "the record of the drop that answers again")
        assert (tmp_path / "hanging" / "sent" / "r1").exists()
        recorder.finish()
        threads[1].join(TIMEOUT)
        assert not threads[1].is_alive()
    ledger.close()
