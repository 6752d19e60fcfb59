"""Web servers and proxies in front of an endpoint, which they reach over plain HTTP on the loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.pki import Pki
from tests.programs import require
from tests.servers.process import accepts_tls
from tests.stage import TIMEOUT, until


@dataclass(frozen=True, slots=True)
class Place:
    """Where a front runs: its folder, its port and that of the endpoint, and its PKI."""

    folder: Path
    port: int
    endpoint: int
    pki: Pki


@dataclass(frozen=True, slots=True)
class Front:
    """A kind of front: its program, the function that writes its configuration, and what reloads it.

    `configure` returns the arguments of the program, `reload_by` is a signal or the arguments of a command.
    """

    program: str
    configure: Callable[[Place], Sequence[str]]
    reload_by: signal.Signals | Sequence[str]


def _nginx(place: Place) -> Sequence[str]:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {place.folder}/{kind};" for kind in kinds)
    conf = place.folder / "nginx.conf"
    conf.write_text(
        f"""
        {"user root;" if os.geteuid() == 0 else ""}
        daemon off; worker_processes 1; pid {place.folder}/pid; error_log stderr;
        events {{ worker_connections 256; }}
        http {{
            access_log off; {temporary}
            server {{
                listen 127.0.0.1:{place.port} ssl http2;
                ssl_certificate {place.pki.server_cert};
                ssl_certificate_key {place.pki.server_key};
                ssl_client_certificate {place.pki.ca_pem};
                ssl_verify_client on;
                client_max_body_size 0;
                location / {{ proxy_pass http://127.0.0.1:{place.endpoint}; }}
            }}
        }}
        """
    )
    return ["-p", str(place.folder), "-e", "stderr", "-c", str(conf)]


def _apache(place: Place, modules: Sequence[str], server: str) -> Sequence[str]:
    """`server` is for the virtual host; `{endpoint}` and `{folder}` in it are those of the place."""
    modules = ["mpm_event", "authn_core", "authz_core", "ssl", "socache_shmcb", "http2", *modules]
    load = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in modules)
    conf = place.folder / "apache.conf"
    conf.write_text(
        f"""
        {load}
        {"User #65534" if os.geteuid() == 0 else ""}
        {"Group #65534" if os.geteuid() == 0 else ""}
        ServerName localhost
        ServerRoot {place.folder}
        DefaultRuntimeDir {place.folder}
        PidFile {place.folder}/pid
        Listen 127.0.0.1:{place.port}
        ErrorLog {place.folder}/error.log
        Mutex file:{place.folder}
        <VirtualHost *:{place.port}>
        SSLEngine on
        SSLCertificateFile {place.pki.server_cert}
        SSLCertificateKeyFile {place.pki.server_key}
        SSLCACertificateFile {place.pki.ca_pem}
        {server.format(endpoint=place.endpoint, folder=place.folder)}
        </VirtualHost>
        """
    )
    return ["-DFOREGROUND", "-f", str(conf)]


_PASSED_ON = """
    Protocols h2 http/1.1
    SSLVerifyClient require
    SSLVerifyDepth 3
    ProxyPass / http://127.0.0.1:{endpoint}/
"""

_WEBDAV = """
    DocumentRoot {folder}/files
    DavLockDB {folder}/dav-lock
    <Location />
        Dav On
        SSLVerifyClient require
        SSLVerifyDepth 3
    </Location>
"""


def apache_that_asks_late(tls_version: str) -> Front:
    """Return Apache with WebDAV on `files`; it asks for the client certificate once it knows the path."""
    server = f"SSLProtocol -all +TLSv{tls_version}\nSSLVerifyClient none\n{_WEBDAV}"
    return Front("apache2", partial(_apache, modules=["dav", "dav_fs"], server=server), signal.SIGUSR1)


def _haproxy(place: Place) -> Sequence[str]:
    pem = place.folder / "server.pem"
    pem.write_bytes(place.pki.server_cert.read_bytes() + place.pki.server_key.read_bytes())
    conf = place.folder / "haproxy.cfg"
    mtls = f"ssl crt {pem} ca-file {place.pki.ca_pem} verify required alpn h2,http/1.1"
    conf.write_text(
        f"""
global
    stats socket {place.folder}/socket expose-fd listeners
defaults
    mode http
    timeout connect 1m
    timeout client 10m
    timeout server 10m
frontend front
    bind 127.0.0.1:{place.port} {mtls}
    default_backend endpoint
backend endpoint
    server one 127.0.0.1:{place.endpoint}
"""
    )
    return ["-W", "-f", str(conf)]


def _caddy(place: Place, max_body: int | None = None) -> Sequence[str]:
    certificate = {"certificate": str(place.pki.server_cert), "key": str(place.pki.server_key)}
    upstream = {"handler": "reverse_proxy", "upstreams": [{"dial": f"127.0.0.1:{place.endpoint}"}]}
    limit = [{"handler": "request_body", "max_size": max_body}] if max_body is not None else []
    authorities = [str(place.pki.ca_pem)]
    verification = {"mode": "require_and_verify", "trusted_ca_certs_pem_files": authorities}
    server = {
        "listen": [f"127.0.0.1:{place.port}"],
        "automatic_https": {"disable": True},
        "tls_connection_policies": [{"client_authentication": verification}],
        "routes": [{"handle": [*limit, upstream]}],
    }
    conf = place.folder / "caddy.json"
    apps = {"http": {"servers": {"front": server}}, "tls": {"certificates": {"load_files": [certificate]}}}
    conf.write_text(json.dumps({"admin": {"listen": f"unix/{place.folder}/admin"}, "apps": apps}))
    return ["run", "--config", str(conf)]


def _lighttpd(place: Place) -> Sequence[str]:
    conf = place.folder / "lighttpd.conf"
    conf.write_text(
        f"""
        server.modules = ("mod_proxy", "mod_openssl")
        server.bind = "127.0.0.1"
        server.port = {place.port}
        server.document-root = "{place.folder}"
        server.upload-dirs = ("{place.folder}")
        server.feature-flags += ("server.graceful-shutdown-timeout" => 600)
        ssl.engine = "enable"
        ssl.pemfile = "{place.pki.server_cert}"
        ssl.privkey = "{place.pki.server_key}"
        ssl.verifyclient.ca-file = "{place.pki.ca_pem}"
        ssl.verifyclient.activate = "enable"
        ssl.verifyclient.enforce = "enable"
        proxy.server = ("" => (("host" => "127.0.0.1", "port" => {place.endpoint})))
        """
    )
    return ["-D", "-f", str(conf)]


def _node(place: Place) -> Sequence[str]:
    files = (place.pki.server_cert, place.pki.server_key, place.pki.ca_pem)
    return [str(Path(__file__).with_name("front.mjs")), *map(str, (place.port, place.endpoint, *files))]


def _squid(place: Place) -> Sequence[str]:
    conf = place.folder / "squid.conf"
    conf.write_text(
        f"""
http_port 127.0.0.1:{place.port}
http_access allow all
cache deny all
access_log none
cache_log {place.folder}/cache.log
pid_filename {place.folder}/pid
coredump_dir {place.folder}
shutdown_lifetime 1 seconds
pinger_enable off
"""
    )
    return ["-N", "-f", str(conf)]


FRONTS = {
    "nginx": Front("nginx", _nginx, signal.SIGHUP),
    "apache": Front(
        "apache2",
        partial(_apache, modules=["proxy", "proxy_http"], server=_PASSED_ON),
        signal.SIGUSR1,
    ),
    "haproxy": Front("haproxy", _haproxy, signal.SIGUSR2),
    "caddy": Front(
        "caddy", _caddy, ["reload", "--config", "caddy.json", "--address", "unix/{folder}/admin", "--force"]
    ),
    "lighttpd": Front("lighttpd", _lighttpd, signal.SIGUSR1),
    "node": Front("node", _node, signal.SIGHUP),
}
"""Servers with TLS and HTTP/2 that pass requests on to an endpoint."""

CADDY_WITH_LIMIT = Front("caddy", partial(_caddy, max_body=100_000), FRONTS["caddy"].reload_by)
"""Caddy that takes bodies of up to 100,000 bytes; it responds 502 to larger ones."""

SQUID = Front("squid", _squid, signal.SIGHUP)
"""A proxy for CONNECT, without TLS."""


@contextmanager
def running_front(
    front: Front, port: int, endpoint: int, pki: Pki
) -> Iterator[tuple[Callable[[], None], Path]]:
    """Run a front until the end of the block; yield a function that reloads it, and its folder.

    The folder is one that each user can reach: some servers change theirs. `files` in it is for files.
    """
    program = require(front.program)
    with tempfile.TemporaryDirectory(prefix=f"backupd-{front.program}-") as base:
        folder = Path(base)
        folder.chmod(0o777)
        (folder / "files").mkdir()
        (folder / "files").chmod(0o777)
        command = front.configure(Place(folder, port, endpoint, pki))
        with (folder / "output.log").open("wb") as output:
            process = subprocess.Popen(
                [program, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "HOME": base, "XDG_DATA_HOME": base, "XDG_CONFIG_HOME": base},
            )
        try:
            until(
                lambda: process.poll() is not None or _is_up(front, port, pki),
                f"{program} to start",
            )
            assert process.poll() is None, (folder / "output.log").read_text()
            yield (lambda: _reload(front, process, folder)), folder
            assert process.poll() is None, (folder / "output.log").read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT)


def _is_up(front: Front, port: int, pki: Pki) -> bool:
    if front is not SQUID:
        return accepts_tls(("127.0.0.1", port), pki)
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _reload(front: Front, process: subprocess.Popen[bytes], folder: Path) -> None:
    if isinstance(front.reload_by, signal.Signals):
        process.send_signal(front.reload_by)
        return
    arguments = [argument.format(folder=folder) for argument in front.reload_by]
    subprocess.run(
        [require(front.program), *arguments], cwd=folder, check=True, timeout=TIMEOUT, capture_output=True
    )
