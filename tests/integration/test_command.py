"""A command is run without a shell, with a time limit, a bounded output and default signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from backupd.telemetry.command import MAX_OUTPUT, CommandResult, run_command
from tests.stage import until

ENVIRON = {"PATH": os.defpath}


def run(script: str, *, stdin: bytes = b"", timeout: float = 60.0, with_stderr: bool = True) -> CommandResult:
    return run_command(
        ["/bin/sh", "-c", script],
        stdin,
        ENVIRON,
        timeout,
        is_cancelled=lambda: False,
        with_stderr=with_stderr,
    )


def test_it_reads_its_input_and_its_output_is_returned() -> None:
    content = b"x" * 300_000  # more than a pipe holds
    result = run("wc -c; echo problem >&2; exit 4", stdin=content)

    assert result == CommandResult(4, b"300000\nproblem\n")


def test_standard_error_is_left_out_on_request() -> None:
    assert run("echo a; echo b >&2", with_stderr=False).output == b"a\n"


def test_output_beyond_the_limit_is_dropped() -> None:
    result = run("head -c 1000000 /dev/zero; exit 5")

    assert (result.exit_code, len(result.output)) == (5, MAX_OUTPUT)


def test_a_command_that_reads_nothing_and_writes_nothing_ends() -> None:
    assert run("exit 0", stdin=b"x" * 300_000) == CommandResult(0, b"")


def test_its_process_group_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    result = run(f"sleep 1000 & echo $! > {file}; wait", timeout=1.0)

    assert result.exit_code is None
    assert not result.is_cancelled
    child = Path(f"/proc/{int(file.read_text())}/stat")
    until(lambda: not child.exists() or " Z " in child.read_text(), "the end of the child")


def test_a_child_that_keeps_the_output_open_is_not_waited_for() -> None:
    started = time.monotonic()
    result = run("sleep 60 & echo $!")
    os.kill(int(result.output), signal.SIGKILL)

    assert result.exit_code == 0
    assert time.monotonic() - started < 55


def test_it_ends_when_it_is_cancelled() -> None:
    result = run_command(
        ["/bin/sleep", "1000"], b"", ENVIRON, 1000.0, is_cancelled=lambda: True, with_stderr=True
    )
    assert (result.exit_code, result.is_cancelled) == (None, True)


def test_its_signals_are_not_blocked(tmp_path: Path) -> None:
    blocked = {signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        result = run("kill -TERM $$; sleep 1000")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    assert result.exit_code == -signal.SIGTERM


@pytest.mark.parametrize("program", ["/no/such/program", "/etc/passwd"])
def test_a_program_that_cannot_be_started_raises(program: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"No such file|Permission denied"):
        run_command([program], b"", ENVIRON, 1.0, is_cancelled=lambda: False, with_stderr=True)
    assert set(os.listdir("/proc/self/fd")) == before


def test_it_inherits_no_other_descriptor() -> None:
    script = "import os; print(sorted(os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')))"
    with open("/dev/null") as held:
        os.set_inheritable(held.fileno(), False)
        result = run_command(
            [sys.executable, "-c", script], b"", ENVIRON, 60.0, is_cancelled=lambda: False, with_stderr=True
        )
    assert result.output == b"['0', '1', '2'] 4\n"  # and that of the list
