"""Deliveries over mTLS to Django, Express, FastAPI, nginx and the receiver, as documented."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from backupd.core.model import Deferred, Delivered, Rejected
from backupd.core.policy import Reason
from backupd.receiver.serve import RunningReceiver, ServerTls
from backupd.upload.http.stream import spki_pin
from tests.documents import block
from tests.programs import require
from tests.servers import documented
from tests.servers.nginx import Nginx
from tests.servers.process import a_listener
from tests.stage import Daemon, Stage
from tests.uploading import MIB, a_destination, a_sender, an_archive

pytestmark = pytest.mark.long

PAGE = documented.PAGE
SECRETS = {
    "appliance.key": "an-api-key",
    "appliance.password": "a-password",
    "gateway.secret": "a client's secret",
    "proxy.password": "secret",
}
ARCHIVES = {
    "one-byte.cfg": b"\0",
    'Zürich "core" 1.tar.gz': os.urandom(300_000),
    "like-a-form.txt": b"\r\n--boundary--\r\nContent-Disposition: form-data\r\n\r\n" * 500,
    "large.tar.gz": os.urandom(6 * MIB),
}


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documented.node_modules(tmp_path_factory.mktemp("node"), "express@5", "multer@2")


@pytest.fixture
def nginx(stage: Stage) -> Iterator[Nginx]:
    require("nginx")
    with a_listener() as listener:
        yield Nginx(stage.base / "nginx", stage.pki, listener)


@pytest.fixture
def server(request: pytest.FixtureRequest, stage: Stage) -> Iterator[str]:
    """The URL of an example server of docs/destinations.md, or of a similar one."""
    kind, folder, pki, store = request.param, stage.base / "server", stage.pki, stage.store
    with ExitStack() as cleanup:
        match kind:
            case "receiver":
                url = cleanup.enter_context(_receiver(stage)).url.removesuffix("/v1/upload")
            case "nginx":
                receiver = cleanup.enter_context(_receiver(stage))
                proxy: Nginx = request.getfixturevalue("nginx")
                conf = block(PAGE, "nginx in front", "nginx")
                cleanup.enter_context(proxy.serving_documented(conf, f"https://127.0.0.1:{receiver.port}"))
                url = proxy.url
            case "express":
                modules = request.getfixturevalue("node_modules")
                url = cleanup.enter_context(documented.express(folder, pki, store, modules))
            case _:
                url = cleanup.enter_context(getattr(documented, kind)(folder, pki, store))
        yield url


def _receiver(stage: Stage, port: int = 0, **options: Any) -> RunningReceiver:
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    return RunningReceiver(stage.store, tls, port=port, **options)


def _configure(stage: Stage, text: str, url: str, *, more: str = "") -> None:
    """Write a documented configuration with the hosts, certificates and secrets of the test."""
    secrets = stage.base / "secrets"
    secrets.mkdir(exist_ok=True)
    for name, secret in SECRETS.items():
        (secrets / name).write_text(f"{secret}\n")
    if "\nca = " not in text:
        text = re.sub(
            "^url = .*$",
            '\\g<0>\nca = "tls/ca.pem"\ncert = "tls/client.pem"\nkey = "tls/client.key"',
            text,
            count=1,
            flags=re.MULTILINE,
        )
    text = re.sub(r"https://[a-z]+\.example\.net", url, text)
    text = re.sub(r'"(?:/etc/backupd/)?tls/(?:login-)?([a-z.]+)"', f'"{stage.pki.folder}/\\1"', text)
    text = text.replace("/etc/backupd/", f"{secrets}/")
    drop = f'[drop.switches]\npath = "{stage.drop}"\nstable_for = "0.1s"\n'
    stage.config.write_text(f'state_dir = "{stage.state}"\n{drop}{text}\n{more}')


def _deliver(stage: Stage, archives: dict[str, bytes] = ARCHIVES) -> Daemon:
    """Put archives into the drop folder, and wait until all are delivered."""
    daemon = stage.daemon().ready()
    for name, content in archives.items():
        stage.put(name, content)
    daemon.wait_for("archive.disposed", len(archives))
    assert _contents(stage.archives(stage.sent)) == _digests(archives)
    return daemon


def _digests(archives: dict[str, bytes]) -> list[str]:
    return sorted(hashlib.sha256(content).hexdigest() for content in archives.values())


def _contents(paths: list[Path]) -> list[str]:
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


def _stored(stage: Stage) -> list[Path]:
    """Return the archives that the server stored."""
    return [path for path in stage.archives(stage.store) if not path.name.startswith("index.sqlite")]


# Every documented configuration and server


@pytest.mark.parametrize(
    ("server", "heading"),
    [
        ("receiver", "The reference receiver"),
        ("fastapi", "FastAPI"),
        ("django", "Django"),
        ("express", "Express with multer"),
        ("nginx", "nginx in front"),
        ("objects", "The archive as the body"),
        ("objects", "A header"),
        ("objects", "The beginning of a digest"),
        ("objects", "Base64, and another algorithm"),
        ("receiver", "Bandwidth by the time of day"),
    ],
    indirect=["server"],
)
def test_every_documented_endpoint_stores_archives_unchanged(stage: Stage, server: str, heading: str) -> None:
    _configure(stage, block(PAGE, heading, "toml"), server)

    daemon = _deliver(stage)

    assert _contents(_stored(stage)) == _digests(ARCHIVES)
    assert len(daemon.events("delivery.verified")) == len(ARCHIVES)
    assert not daemon.events("attempt.failed")
    assert not daemon.events("destination.paused")


@pytest.mark.parametrize(
    ("server", "quotes"),
    [("fastapi", "%22"), ("django", "%22"), ("express", '"'), ("receiver", "_")],
    indirect=["server"],
)
def test_a_file_name_arrives_unchanged_except_for_quotes(stage: Stage, server: str, quotes: str) -> None:
    path = "/v1/upload" if quotes == "_" else "/upload"
    archive = an_archive(stage.base, b"content", name='Zürich-"a"-b.tar.gz')
    with a_sender(a_destination(f"{server}{path}", stage.pki)) as sender:
        outcome = sender.send(archive)

    assert isinstance(outcome, Delivered), outcome
    (stored,) = _stored(stage)
    assert f"Zürich-{quotes}a{quotes}-b" in stored.name


@pytest.mark.parametrize(
    ("server", "reasons"),
    [
        ("receiver", {Reason.TLS_CLIENT, Reason.CONNECTION_LOST}),  # uvicorn seldom sends an alert
        ("fastapi", {Reason.TLS_CLIENT, Reason.CONNECTION_LOST}),
        ("django", {Reason.TLS_CLIENT}),
        ("express", {Reason.TLS_CLIENT}),
    ],
    indirect=["server"],
)
def test_a_missing_client_certificate_rejects_no_archive(
    stage: Stage, server: str, reasons: set[Reason]
) -> None:
    with a_sender(a_destination(f"{server}/upload", ca=stage.pki.ca_pem)) as sender:
        outcome = sender.send(an_archive(stage.base, size=4 * MIB))

    assert isinstance(outcome, Deferred)
    assert outcome.reason in reasons, outcome
    assert _stored(stage) == []


def test_the_limit_of_multer_rejects_only_the_larger_archive(stage: Stage, node_modules: Path) -> None:
    with documented.express(stage.base / "server", stage.pki, stage.store, node_modules, "1000") as url:
        _configure(stage, block(PAGE, "Express with multer", "toml"), url)
        daemon = stage.daemon().ready()
        stage.put("large.cfg", b"x" * 1001)
        stage.put("small.cfg", b"x" * 1000)
        daemon.wait_for("archive.disposed", 2)

    (rejected,) = daemon.events("archive.rejected")
    assert (rejected["archive"], rejected["reason"]) == ("large.cfg", Reason.TOO_LARGE)
    assert [path.read_bytes() for path in _stored(stage)] == [b"x" * 1000]
    assert not daemon.events("destination.paused")


@pytest.mark.parametrize("server", ["django"], indirect=True)
def test_a_host_that_django_does_not_allow_gets_a_400(stage: Stage, server: str) -> None:
    url = server.replace("localhost", "127.0.0.1")
    with a_sender(a_destination(f"{url}/upload", stage.pki)) as sender:
        outcome = sender.send(an_archive(stage.base, b"x"))

    assert isinstance(outcome, Rejected)
    assert outcome.http_status == 400


def test_documented_webdav_stores_each_archive_under_its_path(stage: Stage, nginx: Nginx) -> None:
    stage.store.mkdir()
    _configure(stage, block(PAGE, "WebDAV", "toml"), nginx.url)
    (stage.drop / "zürich").mkdir()
    dav = f"""
        client_max_body_size 0;
        location / {{ root {stage.store}; dav_methods PUT; create_full_put_path on; }}
    """

    with nginx.serving(dav):
        _deliver(stage, {"zürich/a b%2F.tar.gz": b"first", "plain.cfg": b"second"})

        root = stage.store / "archives" / "switches"
        assert (root / "zürich" / "a b%2F.tar.gz").read_bytes() == b"first"
        assert (root / "plain.cfg").read_bytes() == b"second"


def test_missing_folders_of_a_webdav_server_are_created(stage: Stage, nginx: Nginx) -> None:
    archives = {"rack 1/row/sw.cfg": b"first", "rack 1/zürich/sw.cfg": b"second", "sw.cfg": b"third"}
    for name in archives:
        (stage.drop / name).parent.mkdir(parents=True, exist_ok=True)
    stage.store.mkdir()
    _configure(stage, block(PAGE, "WebDAV", "toml"), nginx.url)
    with nginx.serving(f"location / {{ root {stage.store}; dav_methods PUT MKCOL; }}"):
        daemon = _deliver(stage, archives)
    root = stage.store / "archives" / "switches"
    assert {name: (root / name).read_bytes() for name in archives} == archives
    assert not daemon.events("attempt.failed")


def test_the_documented_appliance_requires_user_password_and_api_key(stage: Stage, nginx: Nginx) -> None:
    users = stage.base / "users"
    users.write_text("ers-admin:{PLAIN}a-password\n")
    _configure(stage, block(PAGE, "An appliance's API with user, password and API key", "toml"), nginx.url)
    with _receiver(stage, path="/api/v1/archives") as receiver:
        location = f"""
            client_max_body_size 0;
            {nginx.upstream_tls}
            location / {{
                auth_basic "archives"; auth_basic_user_file {users};
                if ($http_x_api_key != "an-api-key") {{ return 403; }}
                proxy_pass https://127.0.0.1:{receiver.port};
            }}
        """
        with nginx.serving(location):
            daemon = _deliver(stage)

    assert _contents(stage.stored()) == _digests(ARCHIVES)
    assert not daemon.events("attempt.failed")
    assert "a-password" not in daemon.text()
    assert "an-api-key" not in daemon.text()


def test_the_documented_gateway_requires_a_token_that_is_fetched_once(stage: Stage, nginx: Nginx) -> None:
    _configure(stage, block(PAGE, "A gateway with OAuth2", "toml"), nginx.url)
    secret = "a+client%27s+secret"  # encoded as RFC 6749 section 2.3.1 requires
    client = base64.b64encode(f"backupd:{secret}".encode()).decode()
    token = '{"access_token":"the-token","token_type":"Bearer","expires_in":3600}'
    with _receiver(stage) as receiver:
        location = f"""
            client_max_body_size 0;
            {nginx.upstream_tls}
            location = /oauth2/token {{
                if ($http_authorization != "Basic {client}") {{ return 401; }}
                default_type application/json;
                return 200 '{token}';
            }}
            location / {{
                if ($http_authorization != "Bearer the-token") {{ return 401; }}
                proxy_pass https://127.0.0.1:{receiver.port};
            }}
        """
        with nginx.serving(location):
            daemon = _deliver(stage)

    assert _contents(stage.stored()) == _digests(ARCHIVES)
    assert nginx.statuses() == [200] + [201] * len(ARCHIVES)
    assert "the-token" not in daemon.text()


def test_the_documented_proxy_connects(stage: Stage) -> None:
    with documented.connect_proxy(stage.base / "proxy") as proxy, _receiver(stage) as receiver:
        text = block(PAGE, "Through a proxy", "toml").replace("http://proxy.example.net:3128", proxy)
        _configure(stage, text, f"https://localhost:{receiver.port}")
        _deliver(stage)

    assert _contents(stage.stored()) == _digests(ARCHIVES)


def test_the_documented_pinned_endpoint_is_reached_at_another_address(stage: Stage) -> None:
    pair = stage.pki.issue_server("vault-1", ("vault-1.example.net",))
    der = x509.load_pem_x509_certificate(pair.cert.read_bytes())
    pin = spki_pin(der.public_bytes(Encoding.DER))
    tls = ServerTls(pair.cert, pair.key, stage.pki.ca_pem)
    with RunningReceiver(stage.store, tls) as receiver:
        text = block(PAGE, "Pins, names and addresses", "toml")
        text = re.sub('sha256//[^"]*', f"sha256//{pin}", text)
        text = text.replace("10.0.0.5:8443", f"127.0.0.1:{receiver.port}")
        _configure(stage, text, "https://vault.example.net")
        _deliver(stage)

    assert _contents(stage.stored()) == _digests(ARCHIVES)
