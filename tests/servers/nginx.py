"""nginx as an unprivileged process with a folder of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.pki import Pki
from tests.programs import require
from tests.servers.process import port_of, running


class Nginx:
    """An nginx on one port, with one configuration after the other."""

    def __init__(self, folder: Path, pki: Pki, listener: socket.socket) -> None:
        folder.mkdir()
        self._program = require("nginx")
        self._folder = folder
        self._pki = pki
        self._listener = listener
        self.port = port_of(listener)
        self.url = f"https://localhost:{self.port}"

    @contextmanager
    def serving(self, server: str, *, http: str = "", http2: bool = False) -> Iterator[None]:
        """Serve with the lines `server` in the `server` block, with mTLS; `http` are lines outside of it."""
        listen = f"listen 127.0.0.1:{self.port} ssl{' http2' if http2 else ''};"
        with self._running(f"{http}\nserver {{\n{listen}\n{self._mtls}\n{server}\n}}\n"):
            yield

    @contextmanager
    def serving_documented(self, block: str, backend: str) -> Iterator[None]:
        """Serve with a documented `server` block, adapted to the address and PKI of the test."""
        places = {
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "/etc/nginx/tls/server.pem": self._pki.server_cert,
            "/etc/nginx/tls/server.key": self._pki.server_key,
            "/etc/nginx/tls/client-ca.pem": self._pki.ca_pem,
            "http://127.0.0.1:8000": backend,
        }
        for documented, value in places.items():
            assert documented in block
            block = block.replace(documented, str(value))
        with self._running(f"{self.upstream_tls}\n{block}"):
            yield

    @property
    def upstream_tls(self) -> str:
        """Return the lines with nginx's client certificate for a backend with mTLS."""
        return f"""
            proxy_ssl_certificate {self._pki.client_cert};
            proxy_ssl_certificate_key {self._pki.client_key};
            proxy_ssl_trusted_certificate {self._pki.ca_pem};
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
        """

    @property
    def _mtls(self) -> str:
        return f"""
            ssl_certificate {self._pki.server_cert};
            ssl_certificate_key {self._pki.server_key};
            ssl_client_certificate {self._pki.ca_pem};
            ssl_verify_client on;
            ssl_protocols TLSv1.2 TLSv1.3;
        """

    @contextmanager
    def _running(self, http: str) -> Iterator[None]:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "\n".join(f"{kind}_temp_path {self._folder}/{kind};" for kind in kinds)
        conf = self._folder / "nginx.conf"
        conf.write_text(
            f"""
            {"user root;" if os.geteuid() == 0 else ""}
            daemon off;
            worker_processes 1;
            pid {self._folder}/nginx.pid;
            error_log stderr;
            events {{ worker_connections 256; }}
            http {{
                access_log {self._folder}/access.log;
                {temporary}
                {http}
            }}
            """,
            encoding="utf-8",
        )
        command = [self._program, "-p", str(self._folder), "-e", "stderr", "-c", str(conf)]
        inherited = {
            "NGINX": f"{self._listener.fileno()};"
        }  # the variable by which nginx hands its sockets to a new binary
        with running(
            command, self._listener, self._folder / "nginx.log", self._pki, inherited, signal.SIGTERM
        ):
            yield

    def statuses(self) -> list[int]:
        """Return the status of each response to a POST or PUT."""
        return [int(status) for _, status in self._requests()]

    def protocols(self) -> set[str]:
        """Return the HTTP versions of the POST and PUT requests."""
        return {protocol for protocol, _ in self._requests()}

    def _requests(self) -> list[tuple[str, str]]:
        log = (self._folder / "access.log").read_text(encoding="utf-8", errors="replace")
        return re.findall(r'"(?:POST|PUT) [^"]* (HTTP/[0-9.]+)" (\d{3})', log)
