"""A whole installation in a folder: throw-away PKI, drop folder, configuration, the daemon as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.lines import check_log
from tests.pki import Pki

PATIENCE = 180.0
"""Seconds after which a condition is given up; a machine may be slow, a test must not depend on it."""


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until a condition is true and return its value."""
    end = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {patience:g} s in vain for {what}")
        time.sleep(0.02)


class Daemon:
    """`backupd run` as a process, and what it logs.

    `program` is a module that runs it otherwise, `before` a command that ends in running another.
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
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", program, "run", "--config", str(config)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        """Return all that this daemon printed."""
        return self._log.read_bytes()[self._read_from :].decode("utf-8", "strict")

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """Return what it logged; every line has to be JSON."""
        lines, _ = self._lines(self._read_from)
        return [line for line in lines if not name or line["event"] == name]

    def _lines(self, begin: int) -> tuple[list[dict[str, Any]], int]:
        """Return the whole lines in the log from a byte on, and the byte behind them."""
        with self._log.open("rb") as stream:
            stream.seek(begin)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.decode("utf-8", "strict").splitlines()], begin + len(whole)

    def wait_for(
        self, name: str, count: int = 1, patience: float = PATIENCE, **keys: Any
    ) -> list[dict[str, Any]]:
        """Wait until events of a name with these values were logged, and return them.

        Patience begins anew with each that comes: thousands may take as long as they like.
        """
        found: list[dict[str, Any]] = []
        begin = self._read_from

        def more() -> bool:
            nonlocal begin
            ended = self.process.poll() is not None  # before the look: what it said last counts
            lines, begin = self._lines(begin)
            new = [e for e in lines if e["event"] == name and all(e.get(k) == v for k, v in keys.items())]
            found.extend(new)
            assert len(found) >= count or not ended, f"the daemon ended: {self.text()}"
            return bool(new)

        try:
            while len(found) < count:
                until(more, f"{count} x {name} {keys or ''}, of which {len(found)} came", patience)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()[-6000:]}") from None
        return found

    def ready(self) -> Daemon:
        self.wait_for("daemon.ready")
        return self

    def memory(self, which: str) -> int:
        """Return its resident memory in bytes: `VmRSS` for now, `VmHWM` for the peak."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {which}")

    def bytes_read(self) -> int:
        """Return how many bytes it has read from files and sockets, cached ones included."""
        fields = dict(line.split(": ") for line in Path(f"/proc/{self.pid}/io").read_text().splitlines())
        return int(fields["rchar"])

    def stop(self, patience: float = PATIENCE) -> int:
        """Tell it to stop and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)

    def kill(self) -> None:
        """End it as a power cut would, as far as the process goes."""
        self.process.kill()
        self.process.wait()


class Stage:
    """Where a test plays; `url` may be of any server, that of a `RunningReceiver` for one."""

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
        """Write a configuration; the arguments are further TOML lines for its tables."""
        drop = drop if "stable_for" in drop else f'stable_for = "0.1s"\n{drop}'
        if "timeout" not in destination + more:  # a server in a test's own process may be slow to take us
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

    def annex(self, url: str, terms: str = "") -> str:
        """Return the TOML of a second destination; the terms are further lines for its table."""
        return f"""
[destination.annex]
url = "{url}"
ca = "{self.pki.ca_pem}"
cert = "{self.pki.client_cert}"
key = "{self.pki.client_key}"
{terms}
"""

    def a_free_port(self) -> int:
        """Return a port where nobody listens; it is kept from all but servers that are told to take it."""
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
        """Start the daemon; it is ended with the test."""
        daemon = Daemon(self.config, self.log, environ, program, before)
        self._daemons.append(daemon)
        return daemon

    def put(self, name: str | bytes, content: bytes, *, into: Path | None = None) -> Path:
        """Rename a finished file into the drop folder, from a folder beside it."""
        staging = self.base / "staging"
        staging.mkdir(exist_ok=True)
        part = staging / f"part-{time.monotonic_ns()}"
        part.write_bytes(content)
        target = os.path.join(os.fsencode(into or self.drop), os.fsencode(name))
        os.rename(os.fsencode(part), target)
        return Path(os.fsdecode(target))

    def archives(self, folder: Path) -> list[Path]:
        """Return the archives below a folder, without the records beside them."""
        if not folder.exists():
            return []
        suffixes = (".receipt.json", ".reason.json")
        found = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(suffixes))
        return sorted(p for p in found if not p.name.startswith("."))

    def stored(self) -> list[Path]:
        """Return what the receiver stored."""
        return self.archives(self.store / "archives")

    def backupd(
        self, *arguments: str, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run another command on this configuration."""
        return subprocess.run(
            [sys.executable, "-m", "backupd", *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "BACKUPD_CONFIG": str(self.config), **(environ or {})},
        )

    def end(self) -> None:
        """End whatever still runs, and hold what was logged against the catalogue."""
        for daemon in self._daemons:
            if daemon.process.poll() is None:
                daemon.kill()
        for holder in self._holders:
            holder.close()
        if self.log.exists():
            check_log(self.log.read_bytes().decode("utf-8", "replace"))


def a_stage(base: Path) -> Iterator[Stage]:
    """Yield a stage, and clear it afterwards."""
    stage = Stage(base)
    try:
        yield stage
    finally:
        stage.end()
