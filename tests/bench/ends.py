"""The programs that are measured: our daemon, and nginx, curl, openssl and rclone around it."""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from backupd.ledger.sqlite.connection import open_for_reading
from tests.bench.table import BrokenError
from tests.pki import Pki

MIB = 2**20
TICKS = os.sysconf("SC_CLK_TCK")
TIMEOUT = 900.0
_MODULES = Path(os.environ.get("NGINX_MODULES", "/usr/lib/nginx/modules"))


def missing(*programs: str) -> str | None:
    """Return what to say where a program is not installed."""
    absent = [name for name in programs if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def free_port() -> int:
    """Return a port of the loopback interface that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server listens."""
    until(lambda: _listens(port), f"port {port}", process, patience=20, every=0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(
    done: Callable[[], bool],
    what: str,
    process: subprocess.Popen[bytes],
    *,
    patience: float = TIMEOUT,
    every: float = 0.005,
) -> None:
    """Wait for a condition while a process lives."""
    end = time.monotonic() + patience
    while not done():
        if process.poll() is not None:
            raise BrokenError(f"waited for {what}, but the process ended with {process.returncode}")
        if time.monotonic() > end:
            raise BrokenError(f"waited {patience:g} s in vain for {what}")
        time.sleep(every)


def end(process: subprocess.Popen[bytes]) -> int:
    """Terminate a process that was started here."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run(*command: str, stdin: bytes = b"") -> tuple[float, float, str]:
    """Run a program to its end; return its seconds, its CPU seconds and what it printed."""
    with tempfile.TemporaryFile() as feed, tempfile.TemporaryFile() as output:
        feed.write(stdin)
        feed.seek(0)
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=feed, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if process.returncode:
        raise BrokenError(f"{command[0]} ended with {process.returncode}: {text[-300:]}")
    return seconds, used.ru_utime + used.ru_stime, text


class Nginx:
    """An endpoint that takes a POST over mTLS, reads all of it and answers 201.

    A plain `return 201` would answer before it has read the body, which proves nothing. Where the Lua module
    is installed the body is read and dropped, which is cheapest; else nginx spools it to memory, as it does
    for any backend, and asks an empty backend of its own. Curl and we meet the same one worker process.
    """

    def __init__(self, base: Path, pki: Pki, prefix: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}/v1/upload"
        self.drains = "lua" if (_MODULES / "ngx_http_lua_module.so").exists() else "spool"
        base.mkdir()
        memory = Path("/dev/shm")
        self._spool = Path(
            tempfile.mkdtemp(prefix="backupd-bench-", dir=memory if os.access(memory, os.W_OK) else base)
        )
        config = base / "nginx.conf"
        config.write_text(self._config(base, pki))
        self._process = subprocess.Popen(
            [*prefix, "nginx", "-c", str(config), "-p", str(base), "-e", str(base / "error.log")],
            stderr=subprocess.DEVNULL,
        )
        try:
            if prefix:
                until((base / "pid").exists, "nginx", self._process, patience=20)
            else:
                wait_for_port(self.port, self._process)
        except BaseException:
            self.stop()
            raise

    def _config(self, base: Path, pki: Pki) -> str:
        load, location = "", _SPOOL
        if self.drains == "lua":
            load = "".join(
                f"load_module {_MODULES}/{name}_module.so;\n" for name in ("ndk_http", "ngx_http_lua")
            )
            location = _LUA
        temporary = "\n".join(
            f"{kind}_temp_path {base}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi")
        )
        return f"""{load}
daemon off;
{"user root;" if os.geteuid() == 0 else ""}
pid {base}/pid;
error_log {base}/error.log;
worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off;
  {temporary}
  client_body_temp_path {self._spool};
  client_body_buffer_size 512k;
  client_max_body_size 0;
  keepalive_requests 1000000;
  upstream empty {{ server unix:{self._spool}/empty; keepalive 16; keepalive_requests 1000000; }}
  server {{ listen unix:{self._spool}/empty; location / {{ return 201; }} }}
  server {{
    listen 127.0.0.1:{self.port} ssl;
    ssl_certificate {pki.server_cert};
    ssl_certificate_key {pki.server_key};
    ssl_client_certificate {pki.ca_pem};
    ssl_verify_client on;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
    location / {{ {location} }}
  }}
}}
"""

    def no_room(self, mib: int) -> str | None:
        """Return what to say where an archive is too large to be spooled."""
        if self.drains == "lua" or shutil.disk_usage(self._spool).free > (mib + 256) * MIB:
            return None
        return f"nginx has no room in memory for {mib} MiB"

    def stop(self) -> None:
        """End it, and give the memory back."""
        end(self._process)
        shutil.rmtree(self._spool)


_SPOOL = """
      proxy_pass http://empty;
      proxy_http_version 1.1;
      proxy_pass_request_body off;
      proxy_set_header Connection "";
      proxy_set_header Content-Length "";
"""
_LUA = """
      content_by_lua_block {
        local left = tonumber(ngx.var.http_content_length) or 0
        local body = left > 0 and ngx.req.socket()
        while left > 0 do
          local data = body:receiveany(262144)
          if not data then return ngx.exit(400) end
          left = left - #data
        end
        return ngx.exit(201)
      }
"""


def curl_command(pki: Pki, url: str, archive: str, prefix: Sequence[str] = ()) -> list[str]:
    """Return the curl that posts one archive as a form and prints the status on a line."""
    tls = ["--cacert", str(pki.ca_pem), "--cert", str(pki.client_cert), "--key", str(pki.client_key)]
    wanted = ["-sS", "-o", os.devnull, "-w", "%{http_code}\\n"]
    return [*prefix, "curl", *wanted, *tls, "-F", f"file=@{archive}", url]


def curl(pki: Pki, url: str, archive: Path, prefix: Sequence[str] = ()) -> tuple[float, float]:
    """Post one archive; return the seconds and CPU seconds."""
    seconds, used, text = run(*curl_command(pki, url, str(archive), prefix))
    if text != "201\n":
        raise BrokenError(f"curl was answered {text!r}")
    return seconds, used


def curl_each(pki: Pki, url: str, archives: Sequence[Path], prefix: Sequence[str] = ()) -> float:
    """Post archives with a process for each, one after the other; return the seconds."""
    names = "".join(f"{path}\n" for path in archives).encode()
    command = curl_command(pki, url, "{}", prefix)
    seconds, _, text = run("xargs", "-I{}", *command, stdin=names)
    if text != "201\n" * len(archives):
        raise BrokenError(f"curl was answered {text[-200:]!r}")
    return seconds


class Rclone:
    """`rclone serve webdav` with mTLS on a folder in memory, and `rclone copy` to it."""

    def __init__(self, pki: Pki) -> None:
        self._pki = pki
        memory = Path("/dev/shm")
        self._store = Path(
            tempfile.mkdtemp(prefix="backupd-bench-", dir=memory if os.access(memory, os.W_OK) else None)
        )
        port = free_port()
        self._url = f"https://127.0.0.1:{port}"
        server = [
            "--cert",
            str(pki.server_cert),
            "--key",
            str(pki.server_key),
            "--client-ca",
            str(pki.ca_pem),
        ]
        command = ["rclone", "--config", os.devnull, "serve", "webdav", str(self._store), *server]
        self._process = subprocess.Popen(
            [*command, "--addr", f"127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_for_port(port, self._process)
        except BaseException:
            self.stop()
            raise

    def copy(self, folder: Path, count: int) -> float:
        """Copy a folder's files to an empty one; return the seconds."""
        pki = self._pki
        tls = ["--ca-cert", str(pki.ca_pem), "--client-cert", str(pki.client_cert)]
        remote = ["--webdav-url", self._url, "--webdav-vendor", "other", *tls]
        target = f"run-{time.monotonic_ns()}"
        command = ["rclone", "--config", os.devnull, "copy", str(folder), f":webdav:/{target}", *remote]
        seconds, _, _ = run(*command, "--client-key", str(pki.client_key))
        if len(os.listdir(self._store / target)) != count:
            raise BrokenError("rclone did not copy every file")
        shutil.rmtree(self._store / target)
        return seconds

    def stop(self) -> None:
        """End it."""
        end(self._process)
        shutil.rmtree(self._store)


class Ours:
    """`backupd run` as a process with folders of its own; `start` it, measure, `stop` it."""

    def __init__(
        self,
        base: Path,
        pki: Pki,
        url: str,
        *,
        workers: int | None = None,
        drops: int = 1,
        prefix: Sequence[str] = (),
    ) -> None:
        base.mkdir()
        self.drops = [base / f"drop{number}" for number in range(drops)]
        self.drop = self.drops[0]
        self.sent = self.drop / "sent"
        self.state = base / "state"
        self._log = base / "log"
        self._seen: dict[bytes, int] = {}
        self._read_to = 0
        self._tail = b""
        tables = ""
        for number, drop in enumerate(self.drops):
            drop.mkdir()
            tables += f'[drop.d{number}]\npath = "{drop}"\nstable_for = "0s"\nmax_size = "20GiB"\n'
        config = base / "backupd.toml"
        config.write_text(
            f'state_dir = "{self.state}"\nlog.format = "json"\n{tables}[destination.vault]\nurl = "{url}"\n'
            f'ca = "{pki.ca_pem}"\ncert = "{pki.client_cert}"\nkey = "{pki.client_key}"\n'
            f'receipt.digest = "none"\n{f"workers = {workers}" if workers else ""}\n'
        )
        self._command = [*prefix, sys.executable, "-m", "backupd", "run", "--config", str(config)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> float:
        """Start it; return the seconds until it says READY=1 as systemd is told."""
        self._log.write_bytes(b"")
        self._seen, self._read_to, self._tail = {}, 0, b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear, self._log.open("ab") as log:
            name = f"backupd-bench-{os.getpid()}-{time.monotonic_ns()}"
            ear.bind(f"\0{name}")
            ear.settimeout(0.5)
            environ = {**os.environ, "NOTIFY_SOCKET": f"@{name}"}
            environ.pop("WATCHDOG_USEC", None)
            began = time.perf_counter()
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environ)
            while time.perf_counter() - began < TIMEOUT:
                try:
                    if b"READY=1" in ear.recv(4096):
                        return time.perf_counter() - began
                except TimeoutError:
                    if self._process.poll() is not None:
                        break
        raise BrokenError(f"the daemon did not start: {self._why()}")

    def count(self, event: str) -> int:
        """Return how often it said something since it started."""
        with self._log.open("rb") as log:
            log.seek(self._read_to)
            fresh = log.read()
        self._read_to += len(fresh)
        *lines, self._tail = (self._tail + fresh).split(b"\n")
        for line in lines:
            name = line.partition(b'"event"')[2].partition(b'"')[2].partition(b'"')[0]
            self._seen[name] = self._seen.get(name, 0) + 1
        for bad in (b"archive.rejected", b"attempt.failed", b"daemon.failed", b"ledger.failed"):
            if bad in self._seen:
                raise BrokenError(f"the daemon says {bad.decode()}: {self._why()}")
        return self._seen.get(event.encode(), 0)

    def wait_for(self, event: str, count: int, every: float = 0.005) -> None:
        """Wait until it said something that often."""
        until(lambda: self.count(event) >= count, f"{count} x {event}", self.process, every=every)

    def wait_settled(self, count: int) -> None:
        """Wait until that many archives are in sent/, with receipts, all synced: the ledger says so last."""
        self.wait_for("archive.disposed", count)
        ledger = open_for_reading(self.state)
        try:
            until(lambda: _settled(ledger), "the ledger", self.process)
        finally:
            ledger.close()

    def line(self, event: str) -> str:
        """Return the last line with an event."""
        lines = [line for line in self._log.read_text().splitlines() if f'"{event}"' in line]
        return lines[-1] if lines else ""

    def _why(self) -> str:
        """Return the first of its complaints, without what differs from machine to machine."""
        for line in self._log.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):
                told = json.loads(line)
                if told["level"] != "info":
                    return f"{told['event']}: {told.get('error')}"
        return "it gave no reason"

    def cpu(self) -> float:
        """Return the CPU seconds used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self, field: str) -> float:
        """Return VmHWM or VmRSS, in MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
        raise BrokenError(f"no {field}")

    def take_back(self, into: Path) -> list[Path]:
        """Move what was sent to a folder, and the receipts out of the way; return the archives.

        Nothing is removed: for minutes ext4 looks at every inode freed before it gives out another, which
        costs whoever makes files then half of his time.
        """
        back = []
        aside = self.state.parent / f"receipts-{time.monotonic_ns()}"
        aside.mkdir()
        for drop in self.drops:
            for entry in os.scandir(drop / "sent"):
                if entry.name.endswith(".receipt.json"):
                    os.rename(entry.path, aside / entry.name)
                else:
                    os.rename(entry.path, into / entry.name)
                    back.append(into / entry.name)
        return sorted(back)

    def stop(self) -> None:
        """End it; it has to end well."""
        if self._process is not None:
            process, self._process = self._process, None
            code = end(process)
            if code:
                raise BrokenError(f"the daemon ended with {code}: {self._why()}")

    @contextmanager
    def running(self) -> Iterator[Ours]:
        """Start it, and end it afterwards."""
        try:
            self.start()
            yield self
        finally:
            self.stop()


def _settled(ledger: sqlite3.Connection) -> bool:
    query = "SELECT count(*) FROM archive WHERE disposition = 'due' OR state = 'pending'"
    return bool(ledger.execute(query).fetchone()[0] == 0)


class Notices:
    """inotify on one folder: the names of files that were moved in or closed after writing."""

    _CLOSE_WRITE, _MOVED_TO = 0x8, 0x80

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_CLOEXEC)
        mask = self._CLOSE_WRITE | self._MOVED_TO
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
            raise BrokenError(f"no inotify: {os.strerror(ctypes.get_errno())}")

    def wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a file of that name is there, while the process that makes it lives."""
        for _ in range(60):
            while select.select([self._fd], [], [], 1.0)[0]:
                if name.encode() in self._names(os.read(self._fd, 65536)):
                    return
            if process.poll() is not None:
                break
        raise BrokenError(f"waited in vain for {name}")

    @staticmethod
    def _names(data: bytes) -> Iterable[bytes]:
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("I", data, at + 12)
            yield data[at + 16 : at + 16 + length].rstrip(b"\0")
            at += 16 + length

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)
