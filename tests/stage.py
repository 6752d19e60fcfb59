"""An installation in a folder: throw-away PKI, drop folder, configuration, and the daemon as a process."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.forked import ForkedProcess, can_fork
from tests.lines import check_log
from tests.pki import Pki

TIMEOUT = 180.0
"""Seconds after which a wait fails. No test depends on how fast the machine is, so this is generous."""


_SNAPSHOT_TIMEOUT = 20.0
"""Seconds to wait for the recorded state of a daemon."""

_OF_A_SNAPSHOT = ("daemon.heartbeat", "destination.status", "drop.problem")
"""Events that are made from the recorded state."""


def until(condition: Callable[[], Any], description: str, timeout: float = TIMEOUT) -> Any:
    """Wait until a condition is true and return its value; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {timeout:g} s waiting for {description}")
        time.sleep(0.02)


class Daemon:
    """`backupd run` as a process, with access to its log.

    `program` names a module to run in place of `backupd`. `before` is a command, such as `prlimit`, that
    runs the command line appended to it.
    """

    def __init__(
        self,
        config: Path,
        log: Path,
        environ: dict[str, str] | None = None,
        program: str = "backupd",
        before: Sequence[str] = (),
    ) -> None:
        self._log = log
        self._read_from = log.stat().st_size if log.exists() else 0
        self.process: subprocess.Popen[bytes] | ForkedProcess
        environ = {**os.environ, **(environ or {})}
        arguments = ["run", "--config", str(config)]
        with log.open("ab") as stream:
            if program == "backupd" and not before and can_fork(environ):
                self.process = ForkedProcess(arguments, environ, stream.fileno(), stream.fileno())
                return
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", program, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environ,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        """Return the output of this daemon, standard error included."""
        return self._log.read_bytes()[self._read_from :].decode("utf-8", "strict")

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """Return the logged events, of one name or all; fail if a line is not JSON."""
        lines, _ = self._lines(self._read_from)
        return [line for line in lines if not name or line["event"] == name]

    def last_change(self) -> float:
        """Return the time of the last event that changes the state, in seconds since the epoch; 0 without."""
        changes = [e for e in self.events() if e["event"] not in _OF_A_SNAPSHOT and e["level"] != "debug"]
        if not any(event["event"] == "daemon.ready" for event in changes):
            return 0.0
        return datetime.fromisoformat(changes[-1]["timestamp"]).timestamp()

    def count(self, name: str) -> int:
        """Return how many events of a name there were, those that were left out of the log included."""
        return sum(1 + event.get("left_out", 0) for event in self.events(name))

    def _lines(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Return the complete lines of the log from an offset on, and the offset behind them."""
        with self._log.open("rb") as stream:
            stream.seek(offset)
            data = stream.read()
        complete = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in complete.decode("utf-8", "strict").splitlines()]
        except ValueError as error:
            raise AssertionError(f"a line of the log is not JSON:\n{self.text()[-6000:]}") from error
        return lines, offset + len(complete)

    def wait_for(
        self, name: str, count: int = 1, timeout: float = TIMEOUT, **keys: Any
    ) -> list[dict[str, Any]]:
        """Wait until `count` events of a name with these keys were logged, and return them.

        The time-out restarts with each event that matches, so that thousands may take as long as they need.
        """
        found: list[dict[str, Any]] = []
        offset = self._read_from

        def found_more() -> bool:
            nonlocal offset
            ended = self.process.poll() is not None  # checked first, so that the last lines are read as well
            lines, offset = self._lines(offset)
            new = [e for e in lines if e["event"] == name and all(e.get(k) == v for k, v in keys.items())]
            found.extend(new)
            assert len(found) >= count or not ended, f"the daemon ended: {self.text()}"
            return bool(new)

        try:
            while len(found) < count:
                description = f"{count} x {name} {keys or ''}, found {len(found)}"
                until(found_more, description, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()[-6000:]}") from None
        return found

    def ready(self) -> Daemon:
        """Wait until the daemon has logged that it is ready, and return it."""
        self.wait_for("daemon.ready")
        return self

    def memory(self, field: str) -> int:
        """Return the resident memory in bytes: `VmRSS` is the current value, `VmHWM` the peak."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {field} in /proc/{self.pid}/status")

    def bytes_read(self) -> int:
        """Return the bytes read so far from files and sockets, cached ones included."""
        fields = dict(line.split(": ") for line in Path(f"/proc/{self.pid}/io").read_text().splitlines())
        return int(fields["rchar"])

    def stop(self, timeout: float = TIMEOUT) -> int:
        """Send SIGTERM, wait for the end, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End the process with SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.wait()


_RUN_COMMANDS = """
import contextlib, io, json, sys
from backupd.cli import main
done = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["backupd", *command]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            done.append((command, end.code or 0, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


class Stage:
    """The installation of one test: the folders, the PKI, the configuration and its daemons."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.pki = Pki(base / "pki")
        self.drop = base / "drop"
        self.drop.mkdir()
        self.sent = self.drop / "sent"
        self.rejected = self.drop / "rejected"
        self.store = base / "store"
        self.state = base / "state"
        self.config = base / "backupd.toml"
        self.log = base / "daemon.log"
        self._daemons: list[Daemon] = []
        self._holders: list[socket.socket] = []

    def configure(
        self, url: str, *, drop: str = "", destination: str = "", top: str = "", more: str = ""
    ) -> Path:
        """Write the configuration and return its path.

        `drop`, `destination` and `top` are further TOML lines for these tables, `more` is appended.
        """
        drop = drop if "stable_for" in drop else f'stable_for = "0.1s"\n{drop}'
        if "timeout" not in destination + more:  # a server in the process of the test may accept slowly
            destination = f'timeout.connect = "10m"\n{destination}'
        self.config.write_text(
            f"""
state_dir = "{self.state}"
{top}
[drop.switches]
path = "{self.drop}"
{drop}
[destination.vault]
url = "{url}"
ca = "{self.pki.ca_pem}"
cert = "{self.pki.client_cert}"
key = "{self.pki.client_key}"
{destination}
{more}
""",
            encoding="utf-8",
        )
        return self.config

    def annex(self, url: str, options: str = "") -> str:
        """Return the TOML of a second destination, `annex`; the options are further lines for its table."""
        return f"""
[destination.annex]
url = "{url}"
ca = "{self.pki.ca_pem}"
cert = "{self.pki.client_cert}"
key = "{self.pki.client_key}"
{options}
"""

    def a_free_port(self) -> int:
        """Return a port without a listener, reserved for a server that the test starts later."""
        holder = socket.socket()
        self._holders.append(holder)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])

    def daemon(
        self,
        environ: dict[str, str] | None = None,
        program: str = "backupd",
        before: Sequence[str] = (),
    ) -> Daemon:
        """Start the daemon; the end of the test kills it."""
        daemon = Daemon(self.config, self.log, environ, program, before)
        self._daemons.append(daemon)
        return daemon

    def put(self, name: str | bytes, content: bytes, *, into: Path | None = None) -> Path:
        """Rename a complete file into the drop folder, from a folder beside it."""
        staging = self.base / "staging"
        staging.mkdir(exist_ok=True)
        part = staging / f"part-{time.monotonic_ns()}"
        part.write_bytes(content)
        target = os.path.join(os.fsencode(into or self.drop), os.fsencode(name))
        os.rename(os.fsencode(part), target)
        return Path(os.fsdecode(target))

    def archives(self, folder: Path) -> list[Path]:
        """Return the archives below a folder, without their receipt files."""
        if not folder.exists():
            return []
        suffixes = (".receipt.json", ".reason.json")
        found = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(suffixes))
        return sorted(p for p in found if not p.name.startswith("."))

    def stored(self) -> list[Path]:
        """Return the archives that the receiver stored."""
        return self.archives(self.store / "archives")

    def await_snapshot(self) -> None:
        """Wait until the daemon has recorded the state after its last event, unless it hangs."""
        for daemon in self._daemons:
            deadline = time.monotonic() + _SNAPSHOT_TIMEOUT
            while daemon.process.poll() is None and time.monotonic() < deadline:
                if self._snapshot_taken_at() >= daemon.last_change():
                    break
                time.sleep(0.02)

    def _snapshot_taken_at(self) -> float:
        """Return the time of the recorded state; infinite if the ledger cannot be read."""
        try:
            with closing(sqlite3.connect(f"file:{self.state}/ledger.sqlite3?mode=ro", uri=True)) as db:
                row = db.execute("SELECT max(taken_at) FROM snapshot").fetchone()
        except sqlite3.Error:
            return math.inf
        return (row[0] or 0) / 1e6

    def backupd(
        self, *arguments: str, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run another command of `backupd` with this configuration.

        `status` reads the state that the daemon recorded: that of its last event at least.
        """
        if arguments[:1] == ("status",):
            self.await_snapshot()
        environ = {**os.environ, "BACKUPD_CONFIG": str(self.config), **(environ or {})}
        if not can_fork(environ):
            return subprocess.run(
                [sys.executable, "-m", "backupd", *arguments],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
                env=environ,
            )
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = ForkedProcess([*arguments], environ, out.fileno(), err.fileno())
            try:
                code = process.wait(TIMEOUT)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(process.args, code, out.read(), err.read())

    def commands(self, *commands: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
        """Run several commands one after the other, faster: in one process that has imported the program."""
        done = subprocess.run(
            [sys.executable, "-c", _RUN_COMMANDS, json.dumps(commands)],
            stdout=subprocess.PIPE,
            timeout=TIMEOUT,
            check=True,
            env={**os.environ, "BACKUPD_CONFIG": str(self.config)},
        )
        return [subprocess.CompletedProcess(*each) for each in json.loads(done.stdout)]

    def end(self) -> None:
        """Kill the daemons that still run, and check the log against the catalogue of events."""
        for daemon in self._daemons:
            if daemon.process.poll() is None:
                daemon.kill()
        for holder in self._holders:
            holder.close()
        if self.log.exists():
            check_log(self.log.read_bytes().decode("utf-8", "replace"))


def a_stage(base: Path) -> Iterator[Stage]:
    """Yield a stage, and end it afterwards."""
    stage = Stage(base)
    try:
        yield stage
    finally:
        stage.end()
