"""Threads that end: the process gets SIGTERM and ends, whatever prevents the report."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.stage import TIMEOUT

_PROGRAM = """
import os, signal, sys, threading
from backupd.daemon.threads import Threads
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

class LogWithoutMemory(EventLog):
    def emit(self, event, **keys):
        raise MemoryError

def fail(stop):
    raise {error}

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
threading.excepthook = lambda _: None
threads = Threads({log}(LineWriter(1)))
threads.start(fail, threading.Event(), ThreadWatchdog("intake of switches"))
received = signal.sigtimedwait([signal.SIGTERM], {timeout})
sys.exit(7 if received and threads.failed else 1)
"""


@pytest.mark.parametrize("log", ["EventLog", "LogWithoutMemory"])
@pytest.mark.parametrize("error", ["ValueError('a bug')", "MemoryError", "SystemExit", "KeyboardInterrupt"])
def test_a_thread_that_ends_by_an_exception_ends_the_process(log: str, error: str) -> None:
    program = _PROGRAM.format(log=log, error=error, timeout=TIMEOUT)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    if log == "EventLog" and error.startswith(("Value", "Memory")):
        assert '"event":"daemon.failed"' in done.stdout
        assert "intake of switches" in done.stdout


def test_a_thread_that_has_ended_without_a_report_is_found() -> None:
    program = _PROGRAM.format(log="EventLog", error="SystemExit", timeout=TIMEOUT)
    program = program.replace("raise SystemExit", "return").replace(
        "received =",
        "(thread, watchdog), = threads._running\nthread.join()\nthreads.check_ended()\n"
        "assert not threads.failed\n"
        "watchdog.has_returned = False  # as if it had been ended\nthreads.check_ended()\nreceived =",
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "the thread intake of switches has ended" in done.stdout
