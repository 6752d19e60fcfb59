"""The journal gets an entry with a field for each key, or a line if it accepts no entries."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from backupd.telemetry import events
from backupd.telemetry.journal import JournalWriter, LineWriter, is_connected_to_journal, writer_for
from backupd.telemetry.log import EventLog
from tests.monitoring.journal import JournalSocket, a_journald
from tests.stage import Stage, until


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JournalSocket]:
    monkeypatch.chdir(tmp_path)
    journal = JournalSocket(Path("journal"))  # relative: paths of sockets are short
    yield journal
    journal.close()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines"
    path.touch()
    return path


@pytest.fixture
def log(journal: JournalSocket, lines: Path) -> Iterator[EventLog]:
    with lines.open("ab") as file:
        writer = JournalWriter(LineWriter(file.fileno(), prefixed=True), str(journal.path))
        yield EventLog(writer)
        writer.close()


def test_an_event_has_a_field_for_each_key(log: EventLog, journal: JournalSocket, lines: Path) -> None:
    log.emit(
        events.ARCHIVE_DELIVERED,
        archive=b"r1.cfg",
        size_bytes=3,
        destinations=("annex", "vault"),
        verified=True,
    )
    log.emit(events.DAEMON_HEARTBEAT, circuit_by_destination={"vault": "paused"}, oldest_s=1.5)
    fields, beat = journal.entries()
    name, text = fields.pop(4)
    assert name == "BACKUPD_JSON"
    assert json.loads(text)["size_bytes"] == 3
    assert fields == [
        ("MESSAGE", "r1.cfg was delivered to annex, vault"),
        ("PRIORITY", "6"),
        ("SYSLOG_IDENTIFIER", "backupd"),
        ("BACKUPD_EVENT", "archive.delivered"),
        ("BACKUPD_ARCHIVE", "r1.cfg"),
        ("BACKUPD_SIZE_BYTES", "3"),
        ("BACKUPD_DESTINATIONS", "annex"),
        ("BACKUPD_DESTINATIONS", "vault"),
        ("BACKUPD_VERIFIED", "true"),
    ]
    assert dict(beat)["BACKUPD_CIRCUIT_BY_DESTINATION"] == '{"vault": "paused"}'
    assert dict(beat)["BACKUPD_OLDEST_S"] == "1.5"
    assert lines.read_bytes() == b""


def test_the_message_is_a_sentence_with_its_hint_and_the_trace_of_a_bug(
    log: EventLog, journal: JournalSocket
) -> None:
    log.emit(events.LEDGER_FAILED, error="the disk is full", hint="make room\nsoon")
    log.emit(events.DAEMON_FAILED, error="a bug", exc_info=RuntimeError("a bug\x1b[2J"))
    hinted, failed = (dict(entry)["MESSAGE"] for entry in journal.entries())
    assert hinted == "the ledger cannot be used: the disk is full; hint: make room\\nsoon"
    assert failed == "internal failure: a bug\nRuntimeError: a bug\\x1b[2J"


def test_the_priority_follows_from_the_level(log: EventLog, journal: JournalSocket) -> None:
    log.emit(events.DESTINATION_PAUSED, destination="vault")
    log.emit(events.ARCHIVE_IGNORED, reason="symlink")
    assert [dict(entry)["PRIORITY"] for entry in journal.entries()] == ["3", "4"]


def test_no_name_forges_a_field(log: EventLog, journal: JournalSocket) -> None:
    name = b"r1\nPRIORITY=0\nBACKUPD_EVENT=archive.delivered\n\nMESSAGE\n\x03\0\0\0\0\0\0\0abc\n.cfg"
    log.emit(events.ARCHIVE_REJECTED, archive=name)
    (entry,) = journal.entries()
    assert [field for field, _ in entry] == [
        "MESSAGE",
        "PRIORITY",
        "SYSLOG_IDENTIFIER",
        "BACKUPD_EVENT",
        "BACKUPD_JSON",
        "BACKUPD_ARCHIVE",
    ]
    assert dict(entry)["BACKUPD_EVENT"] == "archive.rejected"
    assert dict(entry)["BACKUPD_ARCHIVE"] == name.decode()
    assert dict(entry)["MESSAGE"].isprintable()


def test_an_entry_that_is_too_large_for_a_datagram_is_sent_in_a_file(
    log: EventLog, journal: JournalSocket, lines: Path
) -> None:
    log.emit(events.ARCHIVE_REJECTED, error="x" * 3_000_000)
    log.emit(events.DAEMON_STARTED, pid=1)
    large, small = journal.entries()
    assert dict(large)["BACKUPD_ERROR"] == "x" * 3_000_000
    assert dict(small)["BACKUPD_PID"] == "1"
    assert lines.read_bytes() == b""


def test_an_entry_becomes_a_line_if_no_file_can_be_made_for_it(
    log: EventLog, journal: JournalSocket, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "seccomp")

    monkeypatch.setattr(os, "memfd_create", refuse)
    log.emit(events.ARCHIVE_REJECTED, error="x" * 3_000_000)
    assert journal.entries() == []
    (line,) = lines.read_bytes().splitlines()
    assert json.loads(line.removeprefix(b"<3>"))["error"] == "x" * 3_000_000


def test_a_journal_that_reads_nothing_gets_lines_and_then_entries_again(
    log: EventLog, journal: JournalSocket, lines: Path
) -> None:
    for number in range(1000):  # far more than its queue holds
        log.emit(events.DAEMON_STARTED, pid=number)
    kept = [int(dict(entry)["BACKUPD_PID"]) for entry in journal.entries()]
    fell_back = [line.partition(b">") for line in lines.read_bytes().splitlines()]
    assert {prefix for prefix, _, _ in fell_back} == {b"<6"}
    assert kept + [json.loads(text)["pid"] for _, _, text in fell_back] == list(range(1000))
    assert fell_back
    log.emit(events.DAEMON_STARTED, pid=-1)
    assert [dict(entry)["BACKUPD_PID"] for entry in journal.entries()] == ["-1"]


def test_entries_go_to_a_restarted_journal(log: EventLog, journal: JournalSocket) -> None:
    log.emit(events.DAEMON_STARTED, pid=1)
    journal.close()
    again = JournalSocket(journal.path)
    log.emit(events.DAEMON_STARTED, pid=2)
    assert [dict(entry)["BACKUPD_PID"] for entry in again.entries()] == ["2"]
    again.close()


def test_without_its_socket_the_journal_gets_lines_with_priorities(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    status = os.fstat(writer)
    environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    log = EventLog(writer_for(writer, environ, str(tmp_path / "none")))
    log.emit(events.DESTINATION_PAUSED, destination="vault")
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read()
    assert text.startswith(b"<3>{")
    assert json.loads(text[3:])["destination"] == "vault"


def test_lines_that_can_be_written_in_neither_way_are_counted_and_logged() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = EventLog(JournalWriter(LineWriter(writer, prefixed=True), "/nonexistent/socket"))
    for _ in range(3):
        log.emit(events.DAEMON_STARTED, pid=1)
    reader, fresh = os.pipe()
    os.dup2(fresh, writer)
    os.close(fresh)
    log.emit(events.DAEMON_STARTED, pid=2)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        logged = [json.loads(line[3:]) for line in file]
    assert [(line["event"], line.get("lost_lines")) for line in logged] == [
        ("log.lost", 3),
        ("daemon.started", None),
    ]


def test_a_reader_that_reads_nothing_is_waited_for_only_once() -> None:
    reader, writer = os.pipe()
    lines = LineWriter(writer, timeout=0.05)
    while lines.write_line("x" * 5000):  # until the pipe is full
        pass
    assert lines.lost == 1
    assert not lines.write_line("y")
    while len(os.read(reader, 1 << 20)) == 1 << 20:
        pass
    assert lines.write_line("z")
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read().splitlines()[-1] == b"z"


def test_entries_are_written_only_if_the_descriptor_is_connected_to_the_journal() -> None:
    status = os.fstat(1)
    assert is_connected_to_journal(1, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    for stream in ("", "1:2", "nonsense", f"{status.st_dev}:{status.st_ino + 1}"):
        assert not is_connected_to_journal(1, {"JOURNAL_STREAM": stream})
    assert not is_connected_to_journal(1, {})
    assert not is_connected_to_journal(987, {"JOURNAL_STREAM": "1:2"})
    assert isinstance(writer_for(1, {}), LineWriter)


@pytest.mark.root
def test_the_journal_of_systemd_finds_events_by_their_keys(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    name = "r1\nBACKUPD_EVENT=archive.rejected.cfg"
    with a_journald() as journald, journald.stream() as stream:
        status = os.fstat(stream.fileno())
        daemon = subprocess.Popen(
            [*journald.inside(), sys.executable, "-m", "backupd", "run", "--config", str(stage.config)],
            stdout=stream.fileno(),
            env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        )
        try:
            until(lambda: journald.query("BACKUPD_EVENT=daemon.ready"), "daemon.ready")
            stage.put(name, b"abc")
            (found,) = until(lambda: journald.query("BACKUPD_EVENT=archive.delivered"), "archive.delivered")
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
        assert found["BACKUPD_ARCHIVE"] == name
        assert found["BACKUPD_DESTINATIONS"] == "vault"
        assert found["PRIORITY"] == "6"
        assert found["_TRANSPORT"] == "journal"
        assert json.loads(found["BACKUPD_JSON"])["archive"] == name
        assert found["MESSAGE"] == rf'"{name}" was delivered to vault'.replace("\n", "\\n")
        lines = journald.journalctl("-o", "cat", "--output-fields=BACKUPD_JSON").splitlines()
        assert {"daemon.started", "archive.delivered", "daemon.stopped"} <= {
            json.loads(line)["event"] for line in lines
        }
        assert not journald.query("BACKUPD_EVENT=archive.rejected")
        assert not journald.query("_TRANSPORT=stdout")


@pytest.mark.root
def test_the_journal_of_systemd_accepts_an_entry_in_a_file(tmp_path: Path) -> None:
    error = "x" * 500_000
    with a_journald() as journald, (tmp_path / "lines").open("wb") as file:
        writer = JournalWriter(LineWriter(file.fileno(), prefixed=True), str(journald.socket))
        EventLog(writer).emit(events.LEDGER_FAILED, error=error)
        (found,) = until(lambda: journald.query("BACKUPD_EVENT=ledger.failed"), "ledger.failed")
        writer.close()
        assert found["BACKUPD_ERROR"] == error
        assert found["MESSAGE"] == f"the ledger cannot be used: {error}"
        assert (tmp_path / "lines").read_bytes() == b""
