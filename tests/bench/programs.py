"""The programs that are measured: the daemon, and nginx, curl, openssl and rclone."""

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
    """Return the reason to skip a row if a program is not installed."""
    absent = [name for name in programs if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server listens on a port."""
    until(lambda: _listens(port), f"port {port}", process, timeout=20, every=0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(
    done: Callable[[], bool],
    description: str,
    process: subprocess.Popen[bytes],
    *,
    timeout: float = TIMEOUT,
    every: float = 0.005,
) -> None:
    """Wait for a condition while a process runs."""
    deadline = time.monotonic() + timeout
    while not done():
        if process.poll() is not None:
            raise BrokenError(f"waited for {description}, but the process ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise BrokenError(f"timed out after {timeout:g} s waiting for {description}")
        time.sleep(every)


def end(process: subprocess.Popen[bytes]) -> int:
    """Send SIGTERM to a process, wait for its end, and return the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run(*command: str, stdin: bytes = b"") -> tuple[float, float, str]:
    """Run a program to its end; return the seconds, the CPU seconds and the output."""
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
    """An endpoint that accepts a POST over mTLS, reads the whole body and responds with 201.

    A plain `return 201` would respond before it has read the body. With the Lua module the body is read and
    discarded, which is cheapest. Without it nginx spools the body to memory, as for any backend, and passes
    the request on to an empty backend of its own. All programs use the same single worker process.
    """

    def __init__(self, base: Path, pki: Pki, prefix: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}/v1/upload"
        self.body_reader = "lua" if (_MODULES / "ngx_http_lua_module.so").exists() else "spool"
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
                until((base / "pid").exists, "nginx", self._process, timeout=20)
            else:
                wait_for_port(self.port, self._process)
        except BaseException:
            self.stop()
            raise

    def _config(self, base: Path, pki: Pki) -> str:
        load, location = "", _SPOOL
        if self.body_reader == "lua":
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

    def cannot_spool(self, mib: int) -> str | None:
        """Return the reason to skip a row if an archive is too large to be spooled."""
        if self.body_reader == "lua" or shutil.disk_usage(self._spool).free > (mib + 256) * MIB:
            return None
        return f"nginx can't spool {mib} MiB in memory"

    def stop(self) -> None:
        """Stop nginx, and remove the spool folder."""
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
    """Return the curl command that uploads one archive as a form and prints the status on a line."""
    tls = ["--cacert", str(pki.ca_pem), "--cert", str(pki.client_cert), "--key", str(pki.client_key)]
    output = ["-sS", "-o", os.devnull, "-w", "%{http_code}\\n"]
    return [*prefix, "curl", *output, *tls, "-F", f"file=@{archive}", url]


def curl(pki: Pki, url: str, archive: Path, prefix: Sequence[str] = ()) -> tuple[float, float]:
    """Upload one archive with curl; return the seconds and CPU seconds."""
    seconds, used, text = run(*curl_command(pki, url, str(archive), prefix))
    if text != "201\n":
        raise BrokenError(f"curl got the status {text!r}")
    return seconds, used


def curl_each(pki: Pki, url: str, archives: Sequence[Path], prefix: Sequence[str] = ()) -> float:
    """Upload archives with one curl process for each, one after the other; return the seconds."""
    names = "".join(f"{path}\n" for path in archives).encode()
    command = curl_command(pki, url, "{}", prefix)
    seconds, _, text = run("xargs", "-I{}", *command, stdin=names)
    if text != "201\n" * len(archives):
        raise BrokenError(f"curl got the statuses {text[-200:]!r}")
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
        """Copy the files of a folder into an empty one; return the seconds."""
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
        """Stop the server, and remove its folder."""
        end(self._process)
        shutil.rmtree(self._store)


class Backupd:
    """`backupd run` as a process with folders of its own; `start` it, measure, `stop` it.

    `expect` is the table of each drop in TOML, `metrics` the address of the metrics.
    """

    def __init__(
        self,
        base: Path,
        pki: Pki,
        url: str,
        *,
        workers: int | None = None,
        drops: int = 1,
        prefix: Sequence[str] = (),
        expect: str = "",
        metrics: str = "",
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
            tables += f"expect = {expect}\n" if expect else ""
        config = base / "backupd.toml"
        config.write_text(
            f'state_dir = "{self.state}"\nlog.format = "json"\n{tables}[destination.vault]\nurl = "{url}"\n'
            f'ca = "{pki.ca_pem}"\ncert = "{pki.client_cert}"\nkey = "{pki.client_key}"\n'
            f'receipt.digest = "none"\n{f"workers = {workers}" if workers else ""}\n'
            + (f'[metrics]\nlisten = "{metrics}"\n' if metrics else "")
        )
        self._command = [*prefix, sys.executable, "-m", "backupd", "run", "--config", str(config)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> float:
        """Start the daemon; return the seconds until it sends READY=1 to systemd."""
        self._log.write_bytes(b"")
        self._seen, self._read_to, self._tail = {}, 0, b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket, self._log.open("ab") as log:
            name = f"backupd-bench-{os.getpid()}-{time.monotonic_ns()}"
            notify_socket.bind(f"\0{name}")
            notify_socket.settimeout(0.5)
            environ = {**os.environ, "NOTIFY_SOCKET": f"@{name}"}
            environ.pop("WATCHDOG_USEC", None)
            began = time.perf_counter()
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environ)
            while time.perf_counter() - began < TIMEOUT:
                try:
                    if b"READY=1" in notify_socket.recv(4096):
                        return time.perf_counter() - began
                except TimeoutError:
                    if self._process.poll() is not None:
                        break
        raise BrokenError(f"the daemon did not start: {self._first_error()}")

    def count(self, event: str) -> int:
        """Return how often an event was logged since the start."""
        with self._log.open("rb") as log:
            log.seek(self._read_to)
            new = log.read()
        self._read_to += len(new)
        *lines, self._tail = (self._tail + new).split(b"\n")
        for line in lines:
            name = line.partition(b'"event"')[2].partition(b'"')[2].partition(b'"')[0]
            self._seen[name] = self._seen.get(name, 0) + 1
        for failure in (b"archive.rejected", b"attempt.failed", b"daemon.failed", b"ledger.failed"):
            if failure in self._seen:
                raise BrokenError(f"the daemon logged {failure.decode()}: {self._first_error()}")
        return self._seen.get(event.encode(), 0)

    def wait_for(self, event: str, count: int, every: float = 0.005) -> None:
        """Wait until an event was logged that often."""
        until(lambda: self.count(event) >= count, f"{count} x {event}", self.process, every=every)

    def wait_until_recorded(self, count: int) -> None:
        """Wait until so many archives are in sent/ with their receipt files, and in the ledger."""
        self.wait_for("archive.disposed", count)
        ledger = open_for_reading(self.state)
        try:
            until(lambda: _is_recorded(ledger), "the ledger", self.process)
        finally:
            ledger.close()

    def line(self, event: str) -> str:
        """Return the last log line of an event."""
        lines = [line for line in self._log.read_text().splitlines() if f'"{event}"' in line]
        return lines[-1] if lines else ""

    def _first_error(self) -> str:
        """Return the event and error of the first line above level info."""
        for line in self._log.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):
                fields = json.loads(line)
                if fields["level"] != "info":
                    return f"{fields['event']}: {fields.get('error')}"
        return "no error was logged"

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

    def move_back(self, into: Path) -> list[Path]:
        """Move the archives in sent/ to a folder, and the receipt files elsewhere; return the archives.

        No file is removed: ext4 then checks every freed inode for minutes before it reuses one, which doubles
        the time to create a file.
        """
        back = []
        receipts = self.state.parent / f"receipts-{time.monotonic_ns()}"
        receipts.mkdir()
        for drop in self.drops:
            for entry in os.scandir(drop / "sent"):
                if entry.name.endswith(".receipt.json"):
                    os.rename(entry.path, receipts / entry.name)
                else:
                    os.rename(entry.path, into / entry.name)
                    back.append(into / entry.name)
        return sorted(back)

    def stop(self) -> None:
        """Stop the daemon; raise BrokenError if it fails."""
        if self._process is not None:
            process, self._process = self._process, None
            code = end(process)
            if code:
                raise BrokenError(f"the daemon ended with {code}: {self._first_error()}")

    @contextmanager
    def running(self) -> Iterator[Backupd]:
        """Start the daemon, and stop it afterwards."""
        try:
            self.start()
            yield self
        finally:
            self.stop()


def _is_recorded(ledger: sqlite3.Connection) -> bool:
    query = "SELECT count(*) FROM archive WHERE disposition = 'due' OR state = 'pending'"
    return bool(ledger.execute(query).fetchone()[0] == 0)


class FolderWatch:
    """An inotify watch on a folder, for files that are moved in or closed after writing."""

    _CLOSE_WRITE, _MOVED_TO = 0x8, 0x80

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_CLOEXEC)
        mask = self._CLOSE_WRITE | self._MOVED_TO
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
            raise BrokenError(f"inotify failed: {os.strerror(ctypes.get_errno())}")

    def wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a file of that name appears, while the process that creates it runs."""
        for _ in range(60):
            while select.select([self._fd], [], [], 1.0)[0]:
                if name.encode() in self._names(os.read(self._fd, 65536)):
                    return
            if process.poll() is not None:
                break
        raise BrokenError(f"timed out waiting for {name}")

    @staticmethod
    def _names(data: bytes) -> Iterable[bytes]:
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("I", data, at + 12)
            yield data[at + 16 : at + 16 + length].rstrip(b"\0")
            at += 16 + length

    def close(self) -> None:
        """Close the inotify descriptor."""
        os.close(self._fd)
