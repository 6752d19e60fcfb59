"""A server as a process on a socket that it inherits."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.pki import Pki
from tests.stage import TIMEOUT, until

ROOT = Path(__file__).parents[2]


@contextmanager
def a_listener() -> Iterator[socket.socket]:
    """Yield a listening socket, which keeps its port while one server after the other uses it."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.set_inheritable(True)
        yield listener


def port_of(listener: socket.socket) -> int:
    """Return the port that a socket listens on."""
    port: int = listener.getsockname()[1]
    return port


@contextmanager
def running(
    command: Sequence[str],
    listener: socket.socket,
    log: Path,
    pki: Pki | None,
    environ: Mapping[str, str] | None = None,
    stop_by: signal.Signals = signal.SIGKILL,
) -> Iterator[None]:
    """Run a server on an inherited socket until the end of the block.

    With a PKI, wait for its first TLS handshake. Fail with its log if it is not alive at the end.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
        )
    try:
        if pki is not None:
            until(
                lambda: process.poll() is not None or accepts_tls(listener.getsockname(), pki),
                f"{command[0]} to start",
            )
        yield
        assert process.poll() is None, f"{command[0]} ended: {log.read_text(errors='replace')[-4000:]}"
    finally:
        process.send_signal(stop_by)
        process.wait(TIMEOUT)


def accepts_tls(address: tuple[str, int], pki: Pki) -> bool:
    """Return whether a server completes a TLS handshake with a client certificate."""
    context = ssl.create_default_context(cafile=pki.ca_pem)
    context.load_cert_chain(pki.client_cert, pki.client_key)
    try:
        with (
            socket.create_connection(address, timeout=0.5) as sock,
            context.wrap_socket(sock, server_hostname="localhost"),
        ):
            return True
    except (TimeoutError, ssl.SSLError, ConnectionError):
        return False
