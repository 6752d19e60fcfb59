"""The log: one line an event, whatever is in it."""

from __future__ import annotations

import json
import logging
import os
import re
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
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog, take_over_library_loggers


class Pipe:
    """A log into a pipe that nobody reads until asked."""

    def __init__(self, *, level: str = "debug", console: bool = False) -> None:
        self.reader, self.fd = os.pipe()
        os.set_blocking(self.reader, False)
        self.log = EventLog(LineWriter(self.fd), level=level, console=console)

    def text(self) -> str:
        """Return what was written since last asked."""
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
        """Return what was written since last asked, every line of it JSON."""
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
    pipe = Pipe(console=True)
    yield pipe
    pipe.close()


# JSON


def test_an_event_is_a_line_of_json_with_its_time_and_level_first(pipe: Pipe) -> None:
    pipe.log.emit(events.ARCHIVE_QUEUED, drop="switches", archive=b"r1.cfg", size=3, destinations=("vault",))
    line = pipe.line()
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "event": "archive.queued",
        "drop": "switches",
        "archive": "r1.cfg",
        "size": 3,
        "destinations": ["vault"],
    }


def test_values_of_the_model_are_made_plain(pipe: Pipe) -> None:
    pipe.log.emit(
        events.ATTEMPT_FAILED,
        reason=Reason.CONNECT,
        duration_s=timedelta(seconds=1, microseconds=234_567),
        http_status=None,
        retry_at=datetime(2026, 3, 4, 5, 6, 7, 890, tzinfo=UTC),
        rate=1.23456,
        path=Path("/srv"),
        verified=True,
        gates={"vault": Reason.DNS},
        found=frozenset([b"\xff"]),
    )
    line = pipe.line()
    assert {key: line[key] for key in list(line)[3:]} == {
        "reason": "connect_failed",
        "duration_s": 1.235,
        "retry_at": "2026-03-04T05:06:07Z",
        "rate": 1.235,
        "path": "/srv",
        "verified": True,
        "gates": {"vault": "dns_failed"},
        "found": ["\\xff"],
    }


NASTY = [
    b'bad\xff\n".tar.gz',
    b"a\r\nb\x00\x1b[2J\x07",
    b'x", "level": "error',
    "\u2028\u202e\x85".encode(),
]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_makes_a_second_line_or_another_key(pipe: Pipe, name: bytes) -> None:
    pipe.log.emit(events.ARCHIVE_QUEUED, archive=name)
    line = pipe.line()
    assert list(line) == ["timestamp", "level", "event", "archive"]
    assert line["archive"] == name.decode("utf-8", "backslashreplace")


@given(st.one_of(st.text(), st.binary(), st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zp"]))))
def test_whatever_is_logged_is_one_line_of_ascii_json(value: object) -> None:
    pipe = Pipe()
    try:
        pipe.log.emit(events.ARCHIVE_IGNORED, archive=value, error=value)
        text = pipe.text()
    finally:
        pipe.close()
    assert text.isascii()
    assert text.count("\n") == 1
    assert len(text.splitlines()) == 1
    assert set(json.loads(text)) == {"timestamp", "level", "event", "archive", "error"}


def test_less_than_the_level_is_not_written() -> None:
    pipe = Pipe(level="warning")
    pipe.log.emit(events.DROP_SCANNED, found=1)
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


@pytest.mark.parametrize("on_console", [False, True])
def test_a_trace_tells_where_but_never_the_values_of_variables(on_console: bool) -> None:
    pipe = Pipe(console=on_console)
    error = an_error_with_a_secret()
    pipe.log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
    text = pipe.text()
    assert "sign_in" in text
    assert "sign-in failed after 1 parts" in text
    assert "hunter2" not in text
    pipe.close()


def test_a_trace_is_a_key_of_the_catalogue(pipe: Pipe) -> None:
    error = an_error_with_a_secret()
    pipe.log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
    assert set(pipe.line()) <= {"timestamp", "level", "event", *events.DAEMON_FAILED.keys}


# lines that can't be written


def test_a_log_that_cannot_be_written_never_raises() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    log = EventLog(LineWriter(fd))
    for _ in range(3):
        log.emit(events.DAEMON_STARTED, pid=1)
    os.close(fd)
    log.emit(events.DAEMON_STARTED, pid=1)


def test_lost_lines_are_counted_and_said_once_it_can_be_written_again() -> None:
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
    assert lines[0]["lost"] == 5


def test_half_a_line_spoils_no_other_line(pipe: Pipe) -> None:
    """As when the disk under the log is full for a while."""
    os.set_blocking(pipe.fd, False)
    for number in range(2000):
        pipe.log.emit(events.DAEMON_STARTED, pid=number, path="x" * 5000)
    first = pipe.text()
    pipe.log.emit(events.DAEMON_STARTED, pid=-1)
    whole = (first + pipe.text()).split("\n")
    assert json.loads(whole[-2])["pid"] == -1
    assert json.loads(whole[-3])["event"] == "log.lost"
    assert len(first) >= 5000


def test_many_threads_write_whole_lines(pipe: Pipe) -> None:
    import threading  # noqa: PLC0415 -- for this test alone

    def work(number: int) -> None:
        for turn in range(50):
            pipe.log.emit(events.DAEMON_STARTED, pid=number, size=turn)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pipe.lines()) == 200


# console


def shown(text: str) -> str:
    """Return a line without its colours."""
    return re.sub(r"\x1b\[\d+m", "", text)


def test_a_console_line_is_for_people(console: Pipe) -> None:
    console.log.emit(events.ARCHIVE_QUEUED, drop="switches", archive=b"r 1.cfg", size=3, error="")
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.\d{3} info    archive\.admitted drop=switches archive="r 1\.cfg" size=3 error=""\n',
        shown(console.text()),
    )


@pytest.mark.parametrize("name", NASTY)
def test_no_name_forges_a_console_line(console: Pipe, name: bytes) -> None:
    console.log.emit(events.ARCHIVE_QUEUED, archive=name)
    text = console.text()
    assert text.count("\n") == 1
    assert shown(text)[:-1].isprintable()


def test_no_name_forges_a_key_on_the_console(console: Pipe) -> None:
    console.log.emit(events.ARCHIVE_QUEUED, archive=b'r1" level="error" x="y')
    assert '" level="error"' not in shown(console.text())


def test_no_message_of_an_exception_forges_a_console_line(console: Pipe) -> None:
    forged = "12:00:00.000 info    daemon.stopped clean=True"
    error = RuntimeError(f"x\n{forged}\n\x1b[2J")
    console.log.emit(events.DAEMON_FAILED, exc_info=error)
    text = shown(console.text())
    assert forged in text
    assert forged not in text.splitlines()
    assert "\x1b" not in text


# libraries


@pytest.fixture
def _own_root_logger() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(capture=False)
    root.handlers, root.level = handlers, level


@pytest.mark.usefixtures("_own_root_logger")
def test_what_libraries_warn_of_is_logged_and_their_chatter_is_not(pipe: Pipe) -> None:
    take_over_library_loggers(pipe.log)
    logging.getLogger("httpx").info("HTTP Request: POST https://vault/?key=secret")
    logging.getLogger("watchdog.observers.inotify_c").debug("in-event")
    logging.getLogger("watchdog.observers.inotify_c").warning("queue %s\noverflow", "x")
    line = pipe.line()
    assert (line["event"], line["level"]) == ("library.warning", "warning")
    assert (line["logger"], line["error"]) == ("watchdog.observers.inotify_c", "queue x\noverflow")


@pytest.mark.usefixtures("_own_root_logger")
def test_a_library_with_a_level_of_its_own_is_not_listened_to_below_warning(pipe: Pipe) -> None:
    take_over_library_loggers(pipe.log)
    chatty = logging.getLogger("httpx.chatty")
    chatty.setLevel(logging.DEBUG)
    chatty.info("https://vault/?key=secret")
    assert pipe.lines() == []


@pytest.mark.usefixtures("_own_root_logger")
def test_warnings_of_python_are_logged(pipe: Pipe) -> None:
    take_over_library_loggers(pipe.log)
    warnings.simplefilter("always")
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning: old" in pipe.line()["error"]


@pytest.mark.usefixtures("_own_root_logger")
def test_a_library_that_logs_wrongly_does_not_fail_for_it(pipe: Pipe) -> None:
    take_over_library_loggers(pipe.log)
    logging.getLogger("sloppy").warning("%d files", "three")
    assert pipe.line()["error"] == "%d files"
