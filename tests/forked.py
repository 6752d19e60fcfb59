"""Processes of `backupd` that are forked from one which has imported it: the imports take half of their time.

The pytest process asks a server (`python -m tests.forked`) for each of them. It is a process of its own, with
arguments, environment, output and signals like any other, and takes the place of a `subprocess.Popen`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import backupd

_MAX_REQUEST = 1 << 20

_EXECUTABLE = sys.executable


class ForkedProcess:
    """A running `backupd`, with the interface of `subprocess.Popen` as far as the tests use it."""

    def __init__(self, arguments: list[str], environ: dict[str, str], stdout: int, stderr: int) -> None:
        self.args = ["backupd", *arguments]
        self.returncode: int | None = None
        read, write = os.pipe()
        umask = os.umask(0o077)
        os.umask(umask)
        request = {"arguments": arguments, "environ": environ, "cwd": os.getcwd(), "umask": umask}
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                with _starting:
                    address = _server()
                connection.connect(address)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST)
                socket.send_fds(connection, [json.dumps(request).encode()], [stdout, stderr, write])
        finally:
            os.close(write)
        self._status = os.fdopen(read, "rb")
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that ended it; None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return what `poll` returns; raises TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self.send_signal(signal.SIGKILL)


def can_fork(environ: dict[str, str]) -> bool:
    """Return whether a process with this environment can be forked: not if a part is read at the start.

    Nor if this process is another user for the moment, or a test has replaced the interpreter.
    """
    if sys.executable != _EXECUTABLE or os.geteuid() != os.getuid():
        return False
    names = {name for name, value in environ.items() if os.environ.get(name) != value}
    return not any(name.startswith(("PYTHON", "LD_", "LC_", "LANG", "TZ")) for name in names)


@functools.cache
def _server() -> str:
    """Start the server of this process, and return its abstract address; it ends with this process."""
    address = f"\0backupd-tests-{os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", address[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    _running.append(process)
    return address


_running: list[subprocess.Popen[bytes]] = []
_starting = threading.Lock()


def main() -> None:
    """Fork a process for each request until standard input ends, and run `backupd` in it."""
    _import_all()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{sys.argv[1]}")
        listener.listen(64)
        gc.freeze()  # so that a collection in a forked process copies no memory
        os.write(1, b"ready\n")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the processes that wait
        request = _next_request(listener)
    if request is not None:
        _become(*request)
        importlib.import_module("backupd.cli").main()


def _import_all() -> None:
    """Import the program with all its commands, which import themselves when they are called."""
    for module in pkgutil.walk_packages(backupd.__path__, "backupd."):
        if not module.name.startswith(("backupd.__main__", "backupd.receiver", "backupd.cli.receive")):
            importlib.import_module(module.name)


def _next_request(listener: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return, in a new process, a request and its descriptors; return None in this one in the end."""
    while True:
        if 0 in select.select([0, listener.fileno()], [], [])[0]:
            return None
        connection, _ = listener.accept()
        with connection:
            data, (stdout, stderr, status), _, _ = socket.recv_fds(connection, _MAX_REQUEST, 3)
        if os.fork() == 0:  # reports the end of the process that it forks
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                os.close(status)
                return json.loads(data), [stdout, stderr]
            os.close(stdout)
            os.close(stderr)
            os.write(status, b"%d\n" % pid)
            os.write(status, b"%d\n" % os.waitpid(pid, 0)[1])
            os._exit(0)
        for fd in (stdout, stderr, status):
            os.close(fd)


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Give this process the arguments, the environment and the output of a request."""
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    for target, fd in enumerate(descriptors, 1):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    sys.argv = ["backupd", *request["arguments"]]


if __name__ == "__main__":
    main()
