"""TLS with real handshakes: client and server certificates, versions, and the environment."""

from __future__ import annotations

import os
import pty
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from backupd.config.models import HttpDestinationConfig
from backupd.core.model import Deferred, Delivered, Outcome
from backupd.core.policy import Reason
from backupd.receiver.serve import RunningReceiver
from tests.pki import KeyPair, Pki
from tests.programs import require
from tests.scripted import Peer, ScriptedServer, accept_all, server_context
from tests.stage import TIMEOUT, Stage
from tests.uploading import MIB, a_destination, a_sender, an_archive

VERSIONS = {"tls 1.2": ssl.TLSVersion.TLSv1_2, "tls 1.3": ssl.TLSVersion.TLSv1_3}
_LOOPBACK = ip_address("127.0.0.1")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """A CA that is not trusted."""
    return Pki(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    return VERSIONS[request.param]


def upload(
    context: ssl.SSLContext, pki: Pki, folder: Path, *, host: str = "127.0.0.1", size: int = 1000, **keys: Any
) -> tuple[Outcome, ScriptedServer]:
    """Upload once to a server with a TLS context; return the outcome and the server."""
    with ScriptedServer(accept_all, context) as server:
        url = server.url.replace("127.0.0.1", host)
        with a_sender(a_destination(url, pki, **keys)) as sender:
            return sender.send(an_archive(folder, size=size)), server


def failed(outcome: Outcome) -> Deferred:
    assert isinstance(outcome, Deferred), outcome
    return outcome


def test_the_client_certificate_is_presented_and_the_server_verified(
    tmp_path: Path, pki: Pki, version: ssl.TLSVersion
) -> None:
    outcome, server = upload(server_context(pki, version=version), pki, tmp_path)

    assert isinstance(outcome, Delivered)
    subject = dict(pair for (pair,) in server.peers[0].client_certificate["subject"])
    assert subject["commonName"] == "client"


@pytest.mark.parametrize("size", [1000, 20 * MIB])
@pytest.mark.parametrize("fault", ["expired", "unknown CA"])
def test_a_refused_client_certificate_is_not_a_network_error(
    tmp_path: Path, pki: Pki, foreign: Pki, version: ssl.TLSVersion, fault: str, size: int
) -> None:
    expired = fault == "expired"
    cert, key = pki.issue_expired_client() if expired else (foreign.client_cert, foreign.client_key)

    context = server_context(pki, version=version)
    outcome, server = upload(context, pki, tmp_path, size=size, cert=cert, key=key)

    assert failed(outcome).reason is Reason.TLS_CLIENT, outcome
    assert failed(outcome).error
    assert server.heads == []
    assert len(server.peers) == 1


@pytest.mark.parametrize("size", [1000, 20 * MIB])
@pytest.mark.parametrize(
    ("version", "expected"),
    [(ssl.TLSVersion.TLSv1_2, Reason.TLS), (ssl.TLSVersion.TLSv1_3, Reason.TLS_CLIENT)],
    ids=["tls 1.2: handshake_failure", "tls 1.3: certificate_required"],
)
def test_a_missing_client_certificate_is_not_a_network_error(
    tmp_path: Path, pki: Pki, version: ssl.TLSVersion, expected: Reason, size: int
) -> None:
    context = server_context(pki, version=version)
    outcome, _ = upload(context, pki, tmp_path, size=size, cert=None, key=None)

    assert failed(outcome).reason is expected


@pytest.mark.parametrize("fault", ["host name", "unknown CA", "expired"])
def test_an_unverified_server_receives_no_data(
    tmp_path: Path, pki: Pki, foreign: Pki, version: ssl.TLSVersion, fault: str
) -> None:
    pair = KeyPair(foreign.server_cert, foreign.server_key)
    if fault == "host name":
        pair = pki.issue_server("other", ("other.test",))
    elif fault == "expired":
        pair = pki.issue_expired_server()

    outcome, server = upload(server_context(pki, pair, version=version), pki, tmp_path)

    assert failed(outcome).reason is Reason.TLS
    assert "certificate" in failed(outcome).error
    assert server.heads == []
    assert server.received == 0


def test_both_host_names_and_addresses_are_verified(tmp_path: Path, pki: Pki) -> None:
    only_name = pki.issue_server("only-name", ("localhost",))

    by_name, _ = upload(server_context(pki, only_name), pki, tmp_path, host="localhost")
    by_address, _ = upload(server_context(pki, only_name), pki, tmp_path)

    assert isinstance(by_name, Delivered)
    assert failed(by_address).reason is Reason.TLS


@pytest.mark.parametrize("trusted", ["root", "issuer", "the certificate itself", "another root"])
def test_ca_may_be_any_certificate_of_the_chain_as_with_curl(tmp_path: Path, trusted: str) -> None:
    root, other = trustme.CA(), trustme.CA()
    issuer = root.create_child_ca()
    issued = issuer.issue_cert("localhost", "127.0.0.1")
    pair = KeyPair(tmp_path / "server.pem", tmp_path / "server.key")
    pair.cert.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(pair.key)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(
        {
            "root": root.cert_pem.bytes(),
            "issuer": issuer.cert_pem.bytes(),
            "the certificate itself": issued.cert_chain_pems[0].bytes(),
            "another root": other.cert_pem.bytes(),
        }[trusted]
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    destination = HttpDestinationConfig(url="https://localhost/", ca=ca)
    with ScriptedServer(accept_all, context) as server:
        destination = destination.model_copy(update={"url": server.url})
        with a_sender(destination) as sender:
            outcome = sender.send(an_archive(tmp_path, b"content"))
        curl = subprocess.run(
            [require("curl"), "--silent", "--cacert", ca, "-F", f"file=@{tmp_path}/a.tar.gz", server.url],
            capture_output=True,
            check=False,
            timeout=TIMEOUT,
        )
    assert isinstance(outcome, Delivered) == (trusted != "another root")
    assert (curl.returncode == 0) == (trusted != "another root")


def test_a_server_of_tls_1_1_is_refused(tmp_path: Path, pki: Pki) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context = server_context(pki, version=ssl.TLSVersion.TLSv1_1)
    context.set_ciphers("ALL:@SECLEVEL=0")

    outcome, server = upload(context, pki, tmp_path)

    assert failed(outcome).reason is Reason.TLS
    assert server.peers[0].tls_version is None
    assert server.received == 0


def test_a_server_without_tls_is_identified(tmp_path: Path, pki: Pki) -> None:
    def plain(peer: Any) -> None:
        peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        peer.drain()

    with ScriptedServer(plain) as server:
        url = server.url.replace("http:", "https:")
        with a_sender(a_destination(url, pki)) as sender:
            outcome = sender.send(an_archive(tmp_path, b"x"))

    assert failed(outcome).reason is Reason.TLS


@pytest.mark.parametrize("ended_by", ["deadline", "abort"])
def test_an_endless_tls_handshake_can_be_ended(tmp_path: Path, pki: Pki, ended_by: str) -> None:
    hello_requests = b"\x16\x03\x03\x00\x04\x00\x00\x00\x00" * 10_000

    def script(peer: Peer) -> None:
        flooding.set()
        while not server.stopping.is_set():
            peer.send(hello_requests)

    flooding = threading.Event()
    deadline = {"deadline": "1s"} if ended_by == "deadline" else {}
    with (
        ThreadPoolExecutor(1) as pool,
        ScriptedServer(script) as server,
        a_sender(a_destination(server.url.replace("http:", "https:"), pki, **deadline)) as sender,
    ):
        sending = pool.submit(sender.send, an_archive(tmp_path, size=1000))
        assert flooding.wait(TIMEOUT)
        if ended_by == "abort":
            sender.abort.set()
        outcome = sending.result(timeout=TIMEOUT)
    assert failed(outcome).reason is (Reason.DEADLINE if ended_by == "deadline" else Reason.STOPPED)


def test_an_unknown_host_name_is_distinguished_from_a_closed_port(tmp_path: Path, pki: Pki) -> None:
    archive = an_archive(tmp_path, b"x")
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with a_sender(a_destination(f"https://127.0.0.1:{port}/", pki)) as sender:
            no_port = sender.send(archive)
    with a_sender(a_destination("https://unknown.invalid/", pki)) as sender:
        no_name = sender.send(archive)

    assert failed(no_port).reason is Reason.CONNECT
    assert f"127.0.0.1 port {port}" in failed(no_port).error
    assert failed(no_name).reason is Reason.DNS


def test_a_private_ca_with_few_extensions_is_accepted_by_every_python(tmp_path: Path, pki: Pki) -> None:
    ca_pem, pair = _minimal_ca(tmp_path)

    outcome, _ = upload(server_context(pki, pair), pki, tmp_path, ca=ca_pem)

    assert isinstance(outcome, Delivered)


def _minimal_ca(folder: Path) -> tuple[Path, KeyPair]:
    """Return a CA as openssl(1) has made many for years, and a server certificate that it issued.

    Its basicConstraints are not critical, there is no key usage, and no key identifiers: Python 3.13's
    `create_default_context` refuses that, earlier ones do not.
    """
    now = datetime.now(UTC)

    def certificate(
        subject: str,
        issuer: str,
        key: ec.EllipticCurvePrivateKey,
        signer: ec.EllipticCurvePrivateKey,
        *,
        ca: bool,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
        )
        if ca:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=False)
        else:
            names = x509.SubjectAlternativeName([x509.IPAddress(_LOOPBACK)])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(signer, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_pem, pair = folder / "minimal-ca.pem", KeyPair(folder / "minimal.pem", folder / "minimal.key")
    ca_pem.write_bytes(certificate("minimal", "minimal", ca_key, ca_key, ca=True).public_bytes(Encoding.PEM))
    pair.cert.write_bytes(certificate("server", "minimal", key, ca_key, ca=False).public_bytes(Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return ca_pem, pair


def test_a_refused_certificate_leads_to_exponential_backoff(stage: Stage, foreign: Pki) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki, client_ca=foreign.ca_pem)) as server:
        stage.configure(server.url, destination='retry = { initial = "0.1s", max = "5s" }\nworkers = 2')
        for number in range(10):
            stage.put(f"a{number}.tar.gz", b"%d" % number)
        daemon = stage.daemon().ready()

        daemon.wait_for("destination.paused", count=5)
        connections = len(server.peers)
        daemon.kill()

    events = [event for event in daemon.events() if event.get("reason") == "client_certificate_refused"]
    pauses = [event for event in events if event["event"] == "destination.paused"]
    attempts = [event for event in events if event["event"] == "attempt.failed"]
    assert attempts == daemon.events("attempt.failed")
    assert [event["failures"] for event in pauses[:5]] == [1, 2, 3, 4, 5]
    for event in pauses:
        step = 0.1 * 2 ** (event["failures"] - 1)
        assert step * 0.1 - 0.002 <= event["paused_for_s"] <= step + 0.002
    assert len(attempts) <= len(pauses) + 2  # the second worker before the circuit opened, and the end
    assert connections <= len(attempts) + 1
    assert len(stage.archives(stage.drop)) == 10


def encrypt(key: Path, password: bytes) -> None:
    """Encrypt the key in a file."""
    loaded = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    )


@pytest.mark.parametrize("content", [b"a secret", b"a secret\n", b"a secret\r\n"])
def test_an_encrypted_key_is_decrypted_with_the_password_in_its_file(tmp_path: Path, content: bytes) -> None:
    own = Pki(tmp_path / "pki")
    encrypt(own.client_key, b"a secret")
    password_file = tmp_path / "password"
    password_file.write_bytes(content)

    outcome, _ = upload(server_context(own), own, tmp_path, key_password_file=password_file)

    assert isinstance(outcome, Delivered)


@pytest.mark.parametrize("password", ["none", "wrong", "missing file"])
def test_an_encrypted_key_without_its_password_is_reported(tmp_path: Path, password: str) -> None:
    own = Pki(tmp_path / "pki")
    encrypt(own.client_key, b"a secret")
    password_file = tmp_path / "password"
    if password == "wrong":
        password_file.write_bytes(b"guessed")
    named = None if password == "none" else password_file

    outcome, server = upload(server_context(own), own, tmp_path, key_password_file=named)

    assert failed(outcome).reason is Reason.LOCAL_FILES
    at_fault = password_file if password == "missing file" else own.client_key
    assert str(at_fault) in failed(outcome).error
    assert "guessed" not in failed(outcome).error
    assert server.peers == []


@pytest.mark.skipif(not shutil.which("setsid"), reason="needs setsid(1)")
@pytest.mark.parametrize("caller", ["run", "check", "the uploader"])
def test_no_password_is_prompted_for_on_the_terminal(stage: Stage, caller: str) -> None:
    encrypt(stage.pki.client_key, b"a secret")
    config = stage.configure("https://127.0.0.1:1/v1/upload")
    command = [sys.executable, "-m", "backupd", caller, "--config", str(config)]
    if caller == "the uploader":
        program = (
            "import pathlib, sys; from backupd.config.load import load\n"
            "from backupd.config.tls_loading import TlsFilesError\n"
            "from backupd.upload.http.tls import make_context\n"
            "try: make_context(load(pathlib.Path(sys.argv[1])).destination['vault'])\n"
            "except TlsFilesError as error: sys.exit(error.message)"
        )
        command = [sys.executable, "-c", program, str(config)]

    output = on_a_terminal(command, b"is paused" if caller == "run" else b"")

    assert "is encrypted" in " ".join(output.split())
    assert "PEM pass phrase" not in output


def on_a_terminal(command: list[str], last: bytes) -> str:
    """Run a command with a controlling terminal, and return its output there, up to `last` if that is set."""
    master, slave = pty.openpty()
    output = b""
    with (
        subprocess.Popen(["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave) as process,
        os.fdopen(master, "rb", buffering=0) as terminal,
    ):
        os.close(slave)
        try:
            while not (last and last in output) and select.select([terminal], [], [], TIMEOUT)[0]:
                output += os.read(master, 4096)
        except OSError:  # the command closed its side
            pass
        process.kill()
    return output.decode()


def test_no_tls_session_keys_are_logged(stage: Stage, receiver: RunningReceiver) -> None:
    keys = stage.base / "session-keys"
    stage.configure(receiver.url)
    daemon = stage.daemon({"SSLKEYLOGFILE": str(keys)}).ready()
    stage.put("a.tar.gz", b"secret")
    daemon.wait_for("archive.disposed")

    checked = stage.backupd("check", environ={"SSLKEYLOGFILE": str(keys)})

    assert checked.returncode == 0, checked.stderr
    assert not keys.exists()


def test_nothing_in_the_environment_diverts_an_upload(stage: Stage, foreign: Pki) -> None:
    (stage.base / ".netrc").write_text("default login user password secret\n")
    with (
        ScriptedServer(accept_all, server_context(stage.pki)) as server,
        ScriptedServer(accept_all) as elsewhere,
    ):
        proxy = f"http://127.0.0.1:{elsewhere.port}"
        names = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
        environ = {name: proxy for each in names for name in (each, each.lower())}
        environ |= {"NO_PROXY": "", "no_proxy": "", "HOME": str(stage.base)}
        environ |= {"NETRC": str(stage.base / ".netrc"), "SSL_CERT_FILE": str(foreign.ca_pem)}
        environ |= {"SSL_CERT_DIR": str(foreign.folder), "REQUESTS_CA_BUNDLE": str(foreign.ca_pem)}
        stage.configure(server.url)
        daemon = stage.daemon(environ).ready()
        stage.put("a.tar.gz", b"content")
        daemon.wait_for("archive.disposed")

        checked = stage.backupd("check", environ=environ)

    assert server.requests[0].archive == b"content"
    assert all(b"authorization" not in head.lower() for head in server.heads)
    assert elsewhere.peers == []
    assert checked.returncode == 0, checked.stdout


def test_a_ca_in_the_environment_is_not_trusted(
    tmp_path: Path, pki: Pki, foreign: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(foreign.ca_pem))
    impostor = KeyPair(foreign.server_cert, foreign.server_key)

    outcome, server = upload(server_context(pki, impostor), pki, tmp_path)

    assert failed(outcome).reason is Reason.TLS
    assert server.heads == []
