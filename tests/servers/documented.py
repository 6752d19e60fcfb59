"""The example endpoints of docs/destinations.md, each as a process with mTLS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.documents import block
from tests.pki import Pki
from tests.programs import do_without, require
from tests.servers.process import a_listener, port_of, running

PAGE = "destinations.md"


@contextmanager
def fastapi(folder: Path, pki: Pki, store: Path) -> Iterator[str]:
    """Run the FastAPI route and yield its address."""
    _write_store_module(folder, store)
    (folder / "route.py").write_text(block(PAGE, "FastAPI", "python"))
    with uvicorn("route:app", folder, pki) as url:
        yield url


@contextmanager
def objects(folder: Path, pki: Pki, store: Path) -> Iterator[str]:
    """Run the application of `tests.servers.objects` and yield its address."""
    folder.mkdir()
    store.mkdir()
    with uvicorn("tests.servers.objects:app", folder, pki, STORE=str(store)) as url:
        yield url


@contextmanager
def uvicorn(app: str, folder: Path, pki: Pki, **environ: str) -> Iterator[str]:
    """Run an ASGI application and yield its address."""
    with a_listener() as listener:
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            app,
            "--fd",
            str(listener.fileno()),
            "--app-dir",
            str(folder),
        ]
        command += ["--ssl-certfile", str(pki.server_cert), "--ssl-keyfile", str(pki.server_key)]
        command += ["--ssl-ca-certs", str(pki.ca_pem), "--ssl-cert-reqs", "2"]
        with running(command, listener, folder / "uvicorn.log", pki, environ):
            yield f"https://localhost:{port_of(listener)}"


@contextmanager
def django(folder: Path, pki: Pki, store: Path) -> Iterator[str]:
    """Run the Django view and yield its address."""
    _write_store_module(folder, store)
    (folder / "views.py").write_text(block(PAGE, "Django", "python"))
    (folder / "urls.py").write_text(
        "from django.urls import path\nimport views\nurlpatterns = [path('upload', views.upload)]\n"
    )
    with a_listener() as listener:
        files = [str(path) for path in (pki.server_cert, pki.server_key, pki.ca_pem)]
        command = [
            sys.executable,
            "-m",
            "tests.servers.django_site",
            str(folder),
            str(listener.fileno()),
            *files,
        ]
        with running(command, listener, folder / "django.log", pki):
            yield f"https://localhost:{port_of(listener)}"


@contextmanager
def express(
    folder: Path, pki: Pki, store: Path, modules: Path, max_size: str = "10 * 1024 ** 3"
) -> Iterator[str]:
    """Run the Express server and yield its address; `max_size` is in bytes."""
    node = require("node")
    (store / "incoming").mkdir(parents=True)
    folder.mkdir()
    (folder / "node_modules").symlink_to(modules)
    script = block(PAGE, "Express with multer", "js")
    with a_listener() as listener:
        places = {
            "/srv/archives": store,
            "10 * 1024 ** 3": max_size,
            "tls/server.key": pki.server_key,
            "tls/server.pem": pki.server_cert,
            "tls/client-ca.pem": pki.ca_pem,
            "listen(8443)": f"listen({{ fd: {listener.fileno()} }})",
        }
        for documented, value in places.items():
            assert documented in script
            script = script.replace(documented, str(value))
        (folder / "server.mjs").write_text(script)
        with running([node, "server.mjs"], listener, folder / "express.log", pki):
            yield f"https://localhost:{port_of(listener)}"


@contextmanager
def connect_proxy(folder: Path) -> Iterator[str]:
    """Run the proxy of `tests.servers.connect_proxy` and yield its address."""
    folder.mkdir()
    with a_listener() as listener:
        command = [sys.executable, "-m", "tests.servers.connect_proxy", str(listener.fileno())]
        with running(command, listener, folder / "proxy.log", None):
            yield f"http://127.0.0.1:{port_of(listener)}"


def node_modules(folder: Path, *packages: str) -> Path:
    """Return a folder with these npm packages: that of BACKUPD_TEST_NODE_MODULES, or a new one."""
    require("node")
    given = os.environ.get("BACKUPD_TEST_NODE_MODULES")
    if given:
        return Path(given).absolute()
    npm = require("npm")
    options = ["--no-audit", "--no-fund", "--fetch-retries=0"]
    done = subprocess.run(
        [npm, "install", *options, "--prefix", str(folder), *packages],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode:
        do_without(f"npm can't install {' and '.join(packages)}: {done.stderr[-300:]}")
    return folder / "node_modules"


def _write_store_module(folder: Path, store: Path) -> None:
    folder.mkdir()
    store.mkdir()
    text = block(PAGE, "An endpoint of your own", "python")
    assert "/srv/archives" in text
    (folder / "archive_store.py").write_text(text.replace("/srv/archives", str(store)))
