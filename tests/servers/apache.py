"""Apache as an unprivileged process with a folder of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.pki import Pki
from tests.programs import require
from tests.stage import TIMEOUT, until

_MODULES = ("mpm_event", "authn_core", "authz_core", "dav", "dav_fs", "ssl", "socache_shmcb", "http2")


@contextmanager
def apache(pki: Pki, port: int, server: str) -> Iterator[tuple[str, Path]]:
    """Run Apache on a port with TLS and the lines `server`; yield its address, and its DocumentRoot."""
    with tempfile.TemporaryDirectory(prefix="backupd-apache-") as base:  # it has no access to pytest's
        yield from _running(Path(base), pki, port, server)


def _running(folder: Path, pki: Pki, port: int, server: str) -> Iterator[tuple[str, Path]]:
    program = require("apache2")
    files = folder / "files"
    files.mkdir()
    lines = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in _MODULES)
    owner = ""
    if os.geteuid() == 0:
        folder.chmod(0o755)
        for path in (folder, files):
            os.chown(path, 65534, 65534)
        owner = "User #65534\nGroup #65534"
    configuration = f"""
        {lines}
        {owner}
        ServerName localhost
        ServerRoot {folder}
        DefaultRuntimeDir {folder}
        PidFile {folder}/pid
        Listen 127.0.0.1:{port}
        ErrorLog {folder}/error.log
        Mutex file:{folder}
        DavLockDB {folder}/dav-lock
        DocumentRoot {files}
        <VirtualHost *:{port}>
        SSLEngine on
        SSLCertificateFile {pki.server_cert}
        SSLCertificateKeyFile {pki.server_key}
        SSLCACertificateFile {pki.ca_pem}
        {server}
        </VirtualHost>
    """
    path = folder / "apache.conf"
    path.write_text(configuration)
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [program, "-X", "-f", path], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        until(lambda: process.poll() is not None or (folder / "pid").exists(), "apache2 to start")
        yield f"https://localhost:{port}", files
        assert process.poll() is None, (folder / "output.log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT)
