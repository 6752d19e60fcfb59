"""The log: each event is one line, whatever its values are."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.policy import Reason
from backupd.telemetry import events
from backupd.telemetry.events import COMMON_KEYS
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog, log_library_warnings


class Pipe:
    """A log that is written to a pipe."""

    def __init__(self, *, level: str = "debug", log_format: str = "json") -> None:
        self.reader, self.fd = os.pipe()
        os.set_blocking(self.reader, False)
        self.log = EventLog(LineWriter(self.fd), level=level, log_format=log_format)

    def text(self) -> str:
        """Return the text that was written since the last call."""
        data = b""
        while True:
            try:
                chunk = os.read(self.reader, 1 << 16)
            except BlockingIOError:
                return data.decode("utf-8")
            if not chunk:
                return data.decode("utf-8")
            data += chunk

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of JSON that were written since the last call."""
        text = self.text()
        assert text.endswith("\n") or not text
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def line(self) -> dict[str, Any]:
        (line,) = self.lines()
        return line

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def console() -> Iterator[Pipe]:
    pipe = Pipe(log_format="console")
    yield pipe
    pipe.close()


# JSON


COMMON = list(COMMON_KEYS)


def test_an_event_is_a_line_of_json_that_starts_with_the_common_keys(pipe: Pipe) -> None:
    pipe.log.emit(
        events.ARCHIVE_QUEUED, drop="switches", archive=b"r1.cfg", size_bytes=3, destinations=("vault",)
    )
    line = pipe.line()
    assert list(line)[:5] == COMMON == ["timestamp", "level", "event", "message", "host"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "event": "archive.queued",
        "message": "r1.cfg was queued for vault",
        "host": socket.gethostname(),
        "drop": "switches",
        "archive": "r1.cfg",
        "size_bytes": 3,
        "destinations": ["vault"],
    }


def test_values_of_the_model_become_values_of_json(pipe: Pipe) -> None:
    pipe.log.emit(
        events.ATTEMPT_FAILED,
        reason=Reason.CONNECT,
        duration_s=timedelta(seconds=1, microseconds=234_567),
        http_status=None,
        retry_at=datetime(2026, 3, 4, 5, 6, 7, 890, tzinfo=UTC),
        archives_per_s=1.23456,
        path=Path("/srv"),
        verified=True,
        circuit_by_destination={"vault": Reason.DNS},
        found_files=frozenset([b"\xff"]),
    )
    line = pipe.line()
    assert {key: line[key] for key in list(line)[5:]} == {
        "reason": "connect_failed",
        "duration_s": 1.235,
        "retry_at": "2026-03-04T05:06:07Z",
        "archives_per_s": 1.235,
        "path": "/srv",
        "verified": True,
        "circuit_by_destination": {"vault": "dns_failed"},
        "found_files": ["\\xff"],
    }


NASTY = [
    b'bad\xff\n".tar.gz',
    b"a\r\nb\x00\x1b[2J\x07",
    b'x", "level": "error',
    "\u2028\u202e\x85".encode(),
    b'{error} [{archive}] [ "{host}"',
    b"r1.cfg was rejected\\",
]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_forges_a_line_a_key_or_a_message(pipe: Pipe, name: bytes) -> None:
    pipe.log.emit(events.ARCHIVE_REJECTED, archive=name, error="the checksum differs")
    line = pipe.line()
    assert list(line) == [*COMMON, "archive", "error"]
    assert line["archive"] == name.decode("utf-8", "backslashreplace")
    assert line["message"].isprintable()
    assert line["message"].endswith(" was rejected: the checksum differs")
    assert line["message"].count("the checksum differs") == 1


@given(st.one_of(st.text(), st.binary(), st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zp"]))))
def test_any_value_is_logged_as_one_line_of_ascii_json(value: object) -> None:
    pipe = Pipe()
    try:
        pipe.log.emit(events.ARCHIVE_IGNORED, archive=value, error=value)
        text = pipe.text()
    finally:
        pipe.close()
    assert text.isascii()
    assert text.count("\n") == 1
    assert len(text.splitlines()) == 1
    line = json.loads(text)
    assert set(line) == {*COMMON, "archive", "error"}
    assert line["message"].isprintable()


def test_events_below_the_level_are_not_logged() -> None:
    pipe = Pipe(level="warning")
    pipe.log.emit(events.DROP_SCANNED, found_files=1)
    pipe.log.emit(events.DAEMON_STARTED, pid=1)
    pipe.log.emit(events.ARCHIVE_IGNORED, reason="symlink")
    assert [line["event"] for line in pipe.lines()] == ["archive.ignored"]
    pipe.close()


def an_error_with_a_secret() -> Exception:
    """Return an exception with a trace through functions that hold a secret."""

    def sign_in(token: str) -> None:
        parts = {"token": token}
        raise RuntimeError(f"sign-in failed after {len(parts)} parts")

    try:
        sign_in("hunter" + "2")
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("log_format", ["json", "ecs", "console"])
def test_a_stack_trace_has_functions_but_no_values_of_variables(log_format: str) -> None:
    pipe = Pipe(log_format=log_format)
    error = an_error_with_a_secret()
    pipe.log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
    text = pipe.text()
    assert "sign_in" in text
    assert "sign-in failed after 1 parts" in text
    assert "hunter2" not in text
    pipe.close()


def test_a_stack_trace_is_a_key_of_the_catalogue(pipe: Pipe) -> None:
    error = an_error_with_a_secret()
    pipe.log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
    assert set(pipe.line()) <= {*COMMON, *events.DAEMON_FAILED.keys}


# the Elastic Common Schema


def test_a_line_of_ecs_has_dotted_fields_of_the_schema() -> None:
    pipe = Pipe(log_format="ecs")
    digest = f"sha256:{'0' * 64}"
    pipe.log.emit(events.ARCHIVE_DELIVERED, archive=b"a/r1\xff.cfg", size_bytes=3, digest=digest)
    line = pipe.line()
    assert list(line)[:4] == ["@timestamp", "log.level", "message", "ecs.version"]
    assert line["event.action"] == "archive.delivered"
    assert (line["file.path"], line["file.name"]) == ("a/r1\\xff.cfg", "r1\\xff.cfg")
    assert (line["file.size"], line["file.hash.sha256"]) == (3, "0" * 64)
    assert line["host.name"] == socket.gethostname()
    pipe.close()


# configure


def test_level_and_format_change_for_further_lines() -> None:
    pipe = Pipe(level="warning")
    pipe.log.emit(events.DAEMON_STARTED, pid=1)
    pipe.log.configure("info", "ecs")
    pipe.log.emit(events.DAEMON_STARTED, pid=2)
    assert pipe.line()["process.pid"] == 2
    pipe.close()


def test_a_fixed_level_stays() -> None:
    pipe = Pipe()
    log = EventLog(LineWriter(pipe.fd), level="debug", fixed_level="error")
    log.emit(events.DAEMON_STARTED, pid=1)
    log.configure("info", "json")
    log.emit(events.DAEMON_STARTED, pid=1)
    assert pipe.lines() == []
    pipe.close()


# lines that can't be written


def test_a_log_that_cannot_be_written_never_raises_and_counts_the_lost_lines() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    writer = LineWriter(fd)
    log = EventLog(writer)
    for _ in range(3):  # EPIPE
        log.emit(events.DAEMON_STARTED, pid=1)
    assert writer.lost == 3
    os.close(fd)
    log.emit(events.DAEMON_STARTED, pid=1)  # EBADF
    assert writer.lost == 4


def test_lost_lines_are_logged_once_lines_can_be_written_again() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    log = EventLog(LineWriter(fd))
    for _ in range(5):
        log.emit(events.DAEMON_STARTED, pid=1)
    reader, writer = os.pipe()
    os.dup2(writer, fd)
    os.close(writer)
    for _ in range(2):
        log.emit(events.DAEMON_STARTED, pid=1)
    os.close(fd)
    with os.fdopen(reader, "rb") as file:
        lines = [json.loads(line) for line in file]
    assert [line["event"] for line in lines] == ["log.lost", "daemon.started", "daemon.started"]
    assert lines[0]["lost_lines"] == 5


def a_failed_attempt(number: int, **keys: Any) -> dict[str, Any]:
    return {"destination": "vault", "reason": "connect_failed", "archive": b"r%d" % number, **keys}


def test_of_equal_causes_only_some_lines_are_logged_and_the_others_are_counted() -> None:
    pipe = Pipe(level="info")
    limit = events.ATTEMPT_FAILED.limit
    assert limit
    for number in range(limit + 5):
        pipe.log.emit(events.ATTEMPT_FAILED, **a_failed_attempt(number))
    pipe.log.emit(events.ATTEMPT_FAILED, **a_failed_attempt(99, reason="dns_failed"))
    pipe.log.emit(events.ARCHIVE_QUEUED, archive=b"r1")
    pipe.log.log_left_out()
    pipe.log.log_left_out()
    lines = pipe.lines()
    assert [line["archive"] for line in lines[:limit]] == [f"r{number}" for number in range(limit)]
    assert [line["archive"] for line in lines[limit:]] == ["r99", "r1", f"r{limit + 4}"]
    assert lines[-1]["left_out"] == 4
    assert lines[-1]["message"].endswith("; 4 more like this")
    assert not any("left_out" in line for line in lines[:-1])
    pipe.close()


def test_after_a_heartbeat_lines_of_the_same_cause_are_logged_again() -> None:
    pipe = Pipe(level="info")
    for _ in range(2):
        for number in range(2):
            pipe.log.emit(events.LEDGER_FAILED, error="disk full", hint=str(number))
        pipe.log.log_left_out()
    assert [line["hint"] for line in pipe.lines()] == ["0", "1", "0", "1"]
    pipe.close()


def test_at_the_level_debug_no_line_is_left_out() -> None:
    pipe = Pipe(level="debug")
    for number in range(50):
        pipe.log.emit(events.ATTEMPT_FAILED, **a_failed_attempt(number))
    pipe.log.log_left_out()
    assert len(pipe.lines()) == 50
    pipe.close()


def test_a_partial_line_damages_no_other_line(pipe: Pipe) -> None:
    """Simulate a disk that is full for a while."""
    os.set_blocking(pipe.fd, False)
    for number in range(2000):
        pipe.log.emit(events.DAEMON_STARTED, pid=number, path="x" * 5000)
    first = pipe.text()
    pipe.log.emit(events.DAEMON_STARTED, pid=-1)
    whole = (first + pipe.text()).split("\n")
    assert json.loads(whole[-2])["pid"] == -1
    assert json.loads(whole[-3])["event"] == "log.lost"
    assert len(first) >= 5000


def test_threads_write_whole_lines(pipe: Pipe) -> None:
    import threading  # noqa: PLC0415 -- for this test alone

    def work(number: int) -> None:
        for turn in range(50):
            pipe.log.emit(events.DAEMON_STARTED, pid=number, path=str(turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pipe.lines()) == 200


# console


@pytest.fixture
def _zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the local zone to UTC+3 during the test."""
    monkeypatch.setenv("TZ", "EAT-3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def parts(text: str) -> tuple[str, str]:
    """Return the time and the zone of a console line, and the rest."""
    match = re.fullmatch(r"(\d\d:\d\d:\d\d \S+) (.*)\n", text, re.DOTALL)
    assert match, text
    return match[1], match[2]


@pytest.mark.usefixtures("_zone")
def test_a_console_line_has_the_local_time_and_the_sentence() -> None:
    pipe = Pipe(level="info", log_format="console")
    before = datetime.now().astimezone()
    pipe.log.emit(
        events.ARCHIVE_QUEUED, drop="x", archive=b"r 1.cfg", size_bytes=3, destinations=("vault", "annex")
    )
    time, text = parts(pipe.text())
    assert text == 'info    archive.queued       "r 1.cfg" was queued for vault, annex'
    assert time in {f"{before + timedelta(seconds=late):%H:%M:%S EAT}" for late in range(60)}
    pipe.close()


@pytest.mark.usefixtures("_zone")
def test_times_are_local_on_the_console_and_utc_in_json(console: Pipe, pipe: Pipe) -> None:
    at = datetime(2026, 3, 4, 22, 6, 7, tzinfo=UTC)
    for each in (console, pipe):
        each.log.emit(events.DELIVERY_DEFERRED, archive="r1.cfg", destination="vault", retry_at=at)
    sentence = "the upload of r1.cfg to vault will be retried at "
    assert f"{sentence}2026-03-05 01:06:07 EAT" in console.text()
    assert pipe.line()["message"] == f"{sentence}2026-03-04T22:06:07Z"
    console.log.emit(events.DROP_HELD, drop="switches", user="anna", until=at)
    assert "are held by anna until 2026-03-05 01:06:07 EAT" in console.text()


def test_a_hint_is_in_a_line_of_its_own_on_the_console() -> None:
    pipe = Pipe(level="info", log_format="console")
    pipe.log.emit(events.LEDGER_FAILED, error="the disk is full", hint="make room\nsoon")
    _, text = parts(pipe.text())
    assert text.splitlines() == [
        "error   ledger.failed        the ledger cannot be used: the disk is full",
        "    hint: make room\\nsoon",
    ]
    pipe.close()


def test_keys_are_on_the_console_at_the_level_debug_without_notation_of_python(console: Pipe) -> None:
    console.log.emit(
        events.CONFIG_RELOADED,
        config="/etc/backupd.toml",
        drops_changed=["a", "b"],
        destinations_changed=[],
        verified=True,
        circuit_by_destination={"vault": "paused", "annex": "working"},
    )
    _, text = parts(console.text())
    assert text.partition(" drops_changed=")[2] == (
        '"a, b" destinations_changed="" verified=yes circuit_by_destination="vault=paused annex=working"'
    )


def test_a_heartbeat_is_one_short_line_on_the_console(console: Pipe) -> None:
    keys: dict[str, Any] = dict.fromkeys(events.DAEMON_HEARTBEAT.keys, 0)
    keys |= {"pending": 2, "oldest_s": 200.0, "delivered": 12, "pending_by_destination": {"vault": 2}}
    console.log.emit(events.DAEMON_HEARTBEAT, **keys)
    _, text = parts(console.text())
    assert text == (
        "info    daemon.heartbeat     heartbeat: 2 pending (oldest 3 min), 0 uploading, 12 newly delivered"
    )


@pytest.mark.parametrize(("environ", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True)])
@pytest.mark.parametrize("no_colour", [False, True])
def test_the_console_has_colours_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], coloured: bool, no_colour: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environ, **({"NO_COLOR": "1"} if no_colour else {})}.items():
        monkeypatch.setenv(name, value)
    pipe = Pipe(log_format="console")
    pipe.log.emit(events.DAEMON_STARTED, pid=1)
    assert ("\x1b[" in pipe.text()) == (coloured and not no_colour)
    pipe.close()


@pytest.mark.parametrize("name", NASTY)
def test_no_name_forges_a_console_line(console: Pipe, name: bytes) -> None:
    console.log.emit(events.ARCHIVE_QUEUED, archive=name)
    text = console.text()
    assert text.count("\n") == 1
    assert text[:-1].isprintable()


def test_no_name_forges_a_key_on_the_console(console: Pipe) -> None:
    console.log.emit(events.ARCHIVE_QUEUED, archive=b'r1" level="error" x="y')
    assert '" level="error"' not in console.text()


def test_no_exception_forges_a_console_line(console: Pipe) -> None:
    forged = "12:00:00.000 info    daemon.stopped clean=True"
    error = RuntimeError(f"x\n{forged}\n\x1b[2J")
    console.log.emit(events.DAEMON_FAILED, exc_info=error)
    text = console.text()
    assert forged in text
    assert forged not in text.splitlines()
    assert "\x1b" not in text


# libraries


@pytest.fixture
def _own_root_logger() -> Iterator[None]:
    """Restore the root logger after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(capture=False)
    root.handlers, root.level = handlers, level


@pytest.mark.usefixtures("_own_root_logger")
def test_warnings_of_libraries_are_logged_and_lower_levels_are_not(pipe: Pipe) -> None:
    log_library_warnings(pipe.log)
    logging.getLogger("httpx").info("HTTP Request: POST https://vault/?key=secret")
    logging.getLogger("watchdog.observers.inotify_c").debug("in-event")
    logging.getLogger("watchdog.observers.inotify_c").warning("queue %s\noverflow", "x")
    line = pipe.line()
    assert (line["event"], line["level"]) == ("library.warning", "warning")
    assert (line["logger"], line["error"]) == ("watchdog.observers.inotify_c", "queue x\noverflow")
    assert line["message"] == "watchdog.observers.inotify_c: queue x; overflow"


@pytest.mark.usefixtures("_own_root_logger")
def test_lower_levels_are_not_logged_if_a_library_sets_its_own_level(pipe: Pipe) -> None:
    log_library_warnings(pipe.log)
    chatty = logging.getLogger("httpx.chatty")
    chatty.setLevel(logging.DEBUG)
    chatty.info("https://vault/?key=secret")
    assert pipe.lines() == []


@pytest.mark.usefixtures("_own_root_logger")
def test_warnings_of_python_are_logged(pipe: Pipe) -> None:
    log_library_warnings(pipe.log)
    warnings.simplefilter("always")
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning: old" in pipe.line()["error"]


@pytest.mark.usefixtures("_own_root_logger")
def test_a_library_that_passes_wrong_arguments_does_not_fail(pipe: Pipe) -> None:
    log_library_warnings(pipe.log)
    logging.getLogger("sloppy").warning("%d files", "three")
    assert pipe.line()["error"] == "%d files"
