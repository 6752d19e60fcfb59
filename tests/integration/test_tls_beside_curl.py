"""Certificates, keys and servers of many kinds, each tried by curl with the same files.

Where curl delivers, backupd delivers too. Where neither does, backupd names the cause.
"""

from __future__ import annotations

import ssl
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from ipaddress import ip_address, ip_network
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backupd.config.certificate_files import tls_problems
from backupd.config.problems import FileProblem
from backupd.core.certificate_life import CertificateLimits
from backupd.core.model import Deferred, Delivered
from backupd.core.policy import Reason
from backupd.upload.base import ProbeResult
from backupd.upload.registry import probe_all
from tests.odd_certificates import ODDITIES, altered, with_private_extensions
from tests.pki import in_days
from tests.programs import require
from tests.scripted import ScriptedServer, accept_all
from tests.stage import TIMEOUT
from tests.uploading import a_destination, a_sender, an_archive

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def a_key(kind: str = "EC") -> Key:
    """Return a new private key: `EC`, `P-521`, `Ed25519`, or the number of bits of an RSA key."""
    if kind == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind.isdigit():
        return rsa.generate_private_key(65537, int(kind))
    return ec.generate_private_key(ec.SECP521R1() if kind == "P-521" else ec.SECP256R1())


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key; `altered` is its PEM if that differs."""

    certificate: x509.Certificate
    key: Key
    altered: bytes = b""

    @property
    def pem(self) -> bytes:
        return self.altered or self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self, layout: PrivateFormat = PrivateFormat.PKCS8, password: bytes = b"") -> bytes:
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        return self.key.private_bytes(Encoding.PEM, layout, encryption)


def issue(
    name: str,
    by: Issued | None = None,
    *,
    key: str = "EC",
    names: Sequence[str] = ("127.0.0.1", "localhost"),
    days: tuple[float, float] = (-1, 60),
    purpose: x509.ObjectIdentifier | None = None,
    of: Issued | None = None,
    oddity: str = "",
    path_length: int | None = None,
    excluded: str = "",
) -> Issued:
    """Return a new certificate; `of` gives its subject and key. Without `names` it is an authority.

    An `oddity` is one of `ODDITIES`. `path_length` and `excluded`, a network, restrict an authority.
    """
    own_key = of.key if of else a_key(key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = (by.certificate.subject, by.key) if by else (subject, own_key)
    builder = x509.CertificateBuilder(
        issuer, subject, own_key.public_key(), x509.random_serial_number(), in_days(days[0]), in_days(days[1])
    )
    if names:
        entries = [
            x509.IPAddress(ip_address(each)) if each[0].isdigit() else x509.DNSName(each)
            for each in names
            if each != "none"
        ]
        if entries:
            builder = builder.add_extension(x509.SubjectAlternativeName(entries), critical=False)
    else:
        builder = builder.add_extension(x509.BasicConstraints(True, path_length), critical=True)
    if excluded:
        constraints = x509.NameConstraints(None, [x509.IPAddress(ip_network(excluded))])
        builder = builder.add_extension(constraints, critical=True)
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    if not oddity:
        return Issued(builder.sign(signer, algorithm), own_key)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    certificate = with_private_extensions(builder).sign(signer, algorithm)
    return Issued(certificate, own_key, altered(certificate, signer, oddity))


@dataclass(frozen=True, slots=True)
class Site:
    """The files of a server and of its client, and the host in the url.

    `client_ca` is the authority of the client if that is not the root.
    """

    server: bytes
    server_key: bytes
    ca: bytes
    cert: bytes
    key: bytes
    password: str = ""
    client_ca: bytes = b""
    asks_for_certificate: bool = True
    host: str = "127.0.0.1"
    version: ssl.TLSVersion | None = None
    ciphers: str = "DEFAULT"
    dh_group: str = "ffdhe2048"

    def served_by(self, leaf: Issued, *chain: Issued) -> Site:
        pem = b"".join(each.pem for each in (leaf, *chain))
        return replace(self, server=pem, server_key=leaf.key_pem())

    def shown(self, leaf: Issued, *chain: Issued) -> Site:
        pem = b"".join(each.pem for each in (leaf, *chain))
        return replace(self, cert=pem, key=leaf.key_pem())


@cache
def root() -> Issued:
    return issue("root", names=())


@cache
def intermediate() -> Issued:
    return issue("intermediate", root(), names=())


@cache
def a_site() -> Site:
    server, client = issue("server", root(), purpose=SERVER), issue("client", root(), purpose=CLIENT)
    return Site(server.pem, server.key_pem(), root().pem, client.pem, client.key_pem())


def commented(pem: bytes) -> bytes:
    return b"".join(b"# " + line + b"\n" for line in pem.splitlines())


def in_one_line(pem: bytes) -> bytes:
    first, *middle, last = pem.splitlines()
    return first + b"\n" + b"".join(middle) + b"\n" + last + b"\n"


def with_text(pem: bytes) -> bytes:
    """Return certificates with text around them, as `openssl x509 -text` and browsers write it."""
    return b"# the chain, in \xe4nother charset\n\nCertificate:\n    Data:\n" + pem + b"\n\n-- end --\n"


def cross_signed() -> Site:
    """A client chain that ends with an expired certificate of a root which the server knows by itself."""
    old = issue("old root", names=())
    expired = issue("root", old, names=(), days=(-9, -1), of=root())
    return a_site().shown(issue("client", intermediate()), intermediate(), expired)


def served_with(key: str) -> Site:
    return a_site().served_by(issue("server", root(), key=key))


def shown_with(key: str) -> Site:
    return a_site().shown(issue("client", root(), key=key))


def openssl(folder: Path, command: str) -> None:
    """Run a command of openssl(1) in a folder."""
    words = [require("openssl"), *command.split()]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=TIMEOUT)


def issued_by_openssl(options: str = "", curve: str = "") -> Site:
    """Return a client that openssl(1) has issued: below the root, or an authority with a key on a curve."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ca").write_bytes(root().pem)
        (folder / "ca.key").write_bytes(root().key_pem())
        if curve:
            key = f"-newkey ec -pkeyopt ec_paramgen_curve:{curve} -nodes -keyout ca.key"
            openssl(folder, f"req -x509 {key} -out ca -subj /CN=old")
        openssl(folder, "req -newkey rsa:2048 -nodes -keyout key -out request -subj /CN=client")
        openssl(folder, f"x509 -req {options} -in request -CA ca -CAkey ca.key -CAcreateserial -out cert")
        ca, cert, own_key = ((folder / each).read_bytes() for each in ("ca", "cert", "key"))
        return replace(a_site(), cert=cert + ca, key=own_key, client_ca=ca)


def with_old_encryption(command: str) -> Site:
    """Return a client with a key that a command of openssl(1) has encrypted in an old way."""
    with tempfile.TemporaryDirectory() as name:
        folder, client = Path(name), issue("client", root(), key="2048")
        (folder / "key").write_bytes(client.key_pem())
        providers = "-provider legacy -provider default"
        openssl(folder, f"{command} {providers} -in key -passout pass:secret -out old")
        return replace(a_site(), cert=client.pem, key=(folder / "old").read_bytes(), password="secret")


def laid_out(name: str, change: Callable[[bytes], bytes]) -> Site:
    changed: dict[str, Any] = {name: change(getattr(a_site(), name))}
    return replace(a_site(), **changed)


def client_with(oddity: str) -> Site:
    site = a_site().shown(issue("client", root(), purpose=CLIENT, oddity=oddity))
    # a server of OpenSSL refuses the times, and Python's can't print the name
    return replace(site, asks_for_certificate=not oddity.startswith(("times", "a name")))


def trusting(*authorities: Issued) -> Site:
    """Return a server below the last of some authorities, and a client that trusts the first."""
    site = a_site().served_by(issue("server", authorities[-1]), *authorities[1:])
    return replace(site, ca=authorities[0].pem)


def server_with(oddity: str) -> Site:
    return a_site().served_by(issue("server", root(), names=("localhost", "127.0.0.1"), oddity=oddity))


def with_client_key(kind: str, layout: PrivateFormat, password: str) -> Site:
    client = issue("client", root(), key=kind)
    key = client.key_pem(layout, password.encode())
    return replace(a_site(), cert=client.pem, key=key, password=password)


LAYOUTS = {"PKCS 8": PrivateFormat.PKCS8, "the layout of its own": PrivateFormat.TraditionalOpenSSL}

CIPHERS = (
    "AES128-SHA",
    "AES256-SHA",
    "AES128-SHA256",
    "AES256-GCM-SHA384",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-RSA-AES256-SHA384",
    "DHE-RSA-AES256-SHA",
)
"""Ciphers of TLS 1.2, of which a server with an RSA key may offer only one."""


def with_cipher(cipher: str) -> Site:
    return replace(served_with("2048"), version=ssl.TLSVersion.TLSv1_2, ciphers=cipher)


DELIVERED: dict[str, Callable[[], Site]] = {
    "tls 1.2": lambda: replace(a_site(), version=ssl.TLSVersion.TLSv1_2),
    "tls 1.3": lambda: replace(a_site(), version=ssl.TLSVersion.TLSv1_3),
    **{f"server with the cipher {cipher}": partial(with_cipher, cipher) for cipher in CIPHERS},
    **{f"server with {key}": partial(served_with, key) for key in ("2048", "3072", "P-521", "Ed25519")},
    **{f"client with {key}": partial(shown_with, key) for key in ("2048", "4096", "P-521", "Ed25519")},
    "server below an intermediate": lambda: a_site().served_by(
        issue("server", intermediate()), intermediate()
    ),
    "server that sends the root too": lambda: a_site().served_by(issue("server", root()), root()),
    "server that sends a foreign certificate too": lambda: a_site().served_by(
        issue("server", root()), issue("other", names=())
    ),
    "issuer as ca": lambda: replace(
        a_site().served_by(issue("server", intermediate()), intermediate()),
        ca=intermediate().pem,
    ),
    "server's own certificate as ca": lambda: replace(a_site(), ca=a_site().server),
    "ca with text": lambda: replace(a_site(), ca=with_text(root().pem)),
    "ca with CRLF": lambda: replace(a_site(), ca=root().pem.replace(b"\n", b"\r\n")),
    "ca with others": lambda: replace(
        a_site(), ca=issue("other", names=()).pem + root().pem + issue("old", names=(), days=(-9, -1)).pem
    ),
    "ca without a line end": lambda: replace(a_site(), ca=root().pem.rstrip()),
    "chain of the client": lambda: a_site().shown(issue("client", intermediate()), intermediate()),
    "expired cross-signed root in the chain": cross_signed,
    "cert with text": lambda: replace(a_site(), cert=with_text(a_site().cert)),
    "cert with CRLF": lambda: replace(
        a_site(), cert=a_site().cert.replace(b"\n", b"\r\n"), key=a_site().key.replace(b"\n", b"\r\n")
    ),
    "key below the certificate": lambda: replace(
        a_site(), cert=a_site().cert + a_site().key, key=a_site().cert + a_site().key
    ),
    "key above the certificate": lambda: replace(
        a_site(), cert=a_site().key + a_site().cert, key=a_site().key + a_site().cert
    ),
    "common name alone": lambda: replace(
        a_site().served_by(issue("localhost", root(), names=("none",))), host="localhost"
    ),
    "name": lambda: replace(a_site(), host="localhost"),
    "wildcard": lambda: replace(
        a_site().served_by(issue("server", root(), names=("*.vault.test",))), host="one.vault.test"
    ),
    **{
        f"{kind} key in {layout}, {'encrypted' if password else 'plain'}": partial(
            with_client_key, kind, LAYOUTS[layout], password
        )
        for kind, layout, password in product(("EC", "2048"), LAYOUTS, ("", "a secret"))
    },
    **{f"client with {oddity}": partial(client_with, oddity) for oddity in ODDITIES},
    **{
        f"server with {oddity}": partial(server_with, oddity)
        for oddity in ODDITIES
        if not oddity.startswith("times")
    },
    "issuer of the client on an unknown curve": lambda: issued_by_openssl(curve="prime239v1"),
    "cert below an old one in comments": lambda: replace(
        a_site(), cert=commented(issue("client", root(), days=(-9, -1)).pem) + a_site().cert
    ),
    "cert below a comment about PEM": lambda: replace(
        a_site(), cert=b"# begins with -----BEGIN CERTIFICATE-----\n" + a_site().cert
    ),
    "ca below an old one in comments": lambda: replace(
        a_site(), ca=commented(issue("root", names=(), days=(-9, -1)).pem) + root().pem
    ),
    "cert with trailing blanks": lambda: replace(a_site(), cert=a_site().cert.replace(b"\n", b" \t\n")),
    "cert with a byte order mark": lambda: replace(a_site(), cert=b"\xef\xbb\xbf" + a_site().cert),
    "cert in one line": lambda: replace(a_site(), cert=in_one_line(a_site().cert)),
    "password that is not needed": lambda: replace(a_site(), password="secret"),
}

LAYOUT_FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "is indented": lambda pem: b"  " + pem.replace(b"\n", b"\n  "),
    "has lines that end with CR alone": lambda pem: pem.replace(b"\n", b"\r"),
    "has blank lines within its PEM": lambda pem: pem.replace(b"\n", b"\n\n"),
    "is in UTF-16": lambda pem: pem.decode().encode("utf-16"),
}

REFUSED: dict[str, tuple[Callable[[], Site], str]] = {
    "another root": (
        lambda: replace(a_site(), ca=issue("other", names=()).pem),
        "`ca` holds another authority",
    ),
    "another root of the same name": (
        lambda: replace(a_site(), ca=issue("root", names=()).pem),
        "`ca` holds another authority",
    ),
    "missing intermediate": (lambda: a_site().served_by(issue("server", intermediate())), "no intermediate"),
    "self-signed": (lambda: a_site().served_by(issue("server")), "self-signed"),
    "expired": (lambda: a_site().served_by(issue("server", root(), days=(-9, -1))), "expired"),
    "not yet valid": (lambda: a_site().served_by(issue("server", root(), days=(1, 9))), "not yet valid"),
    "expired intermediate": (
        lambda: a_site().served_by(
            issue("server", issue("middle", root(), names=(), days=(-9, -1), of=intermediate())),
            issue("middle", root(), names=(), days=(-9, -1), of=intermediate()),
        ),
        "expired",
    ),
    "times without seconds": (partial(server_with, "times without seconds"), "format error"),
    "other name": (lambda: a_site().served_by(issue("server", root(), names=("vault.test",))), "127.0.0.1"),
    "other address": (lambda: a_site().served_by(issue("server", root(), names=("10.0.0.1",))), "127.0.0.1"),
    "wildcard of another level": (
        lambda: replace(
            a_site().served_by(issue("server", root(), names=("*.vault.test",))), host="a.b.vault.test"
        ),
        "a.b.vault.test",
    ),
    "client's certificate as the server's": (
        lambda: a_site().served_by(issue("server", root(), purpose=CLIENT)),
        "not issued for servers",
    ),
    "signed by a leaf": (
        lambda: a_site().served_by(issue("server", issue("leaf", root()))),
        "issuer",
    ),
    "short key": (lambda: a_site().served_by(issue("server", root(), key="1024")), "shorter than"),
    "short DH parameters": (
        lambda: replace(with_cipher("DHE-RSA-AES256-SHA"), dh_group="modp_1536"),
        "Diffie-Hellman parameters are shorter",
    ),
    "excluded name": (
        lambda: trusting(issue("narrow", names=(), excluded="127.0.0.0/8")),
        "may not issue certificates for this name",
    ),
    "path that is too long": (
        lambda: trusting((top := issue("top", names=(), path_length=0)), issue("middle", top, names=())),
        "none of so many others below it",
    ),
    "tls 1.1": (lambda: replace(a_site(), version=ssl.TLSVersion.TLSv1_1), "other versions of TLS"),
    "client expired": (lambda: a_site().shown(issue("client", root(), days=(-9, -1))), "expired"),
    "client of another root": (
        lambda: a_site().shown(issue("client", issue("other", names=()))),
        "does not trust the CA",
    ),
    "client without its intermediate": (
        lambda: a_site().shown(issue("client", intermediate())),
        "lacks an intermediate",
    ),
    "server's certificate as the client's": (
        lambda: a_site().shown(issue("client", root(), purpose=SERVER)),
        "it is not issued for clients",
    ),
    "client's chain in the wrong order": (
        lambda: replace(
            (site := a_site().shown(issue("client", intermediate()))), cert=intermediate().pem + site.cert
        ),
        "is the key of certificate 2 in",
    ),
    "client's short key": (lambda: shown_with("1024"), "a key that is shorter than OpenSSL accepts"),
    "client's old digest": (lambda: issued_by_openssl("-sha1"), "an old digest such as SHA-1"),
    **{
        f"{name} {text}": (partial(laid_out, name, change), text)
        for name, (text, change) in product(("ca", "cert", "key"), LAYOUT_FAULTS.items())
    },
    "key encrypted with DES in PKCS 8": (
        lambda: with_old_encryption("pkcs8 -topk8 -v1 PBE-MD5-DES"),
        "is encrypted with an old algorithm",
    ),
    "key encrypted with RC2 in PKCS 8": (
        lambda: with_old_encryption("pkcs8 -topk8 -v1 PBE-SHA1-RC2-40"),
        "is encrypted with an old algorithm",
    ),
    "key encrypted with DES in the layout of its own": (
        lambda: with_old_encryption("rsa -des -traditional"),
        "is encrypted with an old algorithm",
    ),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """The outcome of an upload, the exit code of curl, and the errors that `backupd check` finds."""

    outcome: Delivered | Deferred
    curl: int
    errors: list[FileProblem]
    probe: ProbeResult


def deliver(site: Site, folder: Path) -> Trial:
    """Send an archive by backupd and by curl, and check the destination."""
    files = {name: folder / f"{name}.pem" for name in ("server", "server_key", "ca", "cert", "key")}
    for name, path in files.items():
        path.write_bytes(getattr(site, name))
        path.chmod(0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(f"{site.ciphers}:@SECLEVEL=0")
    context.load_cert_chain(files["server"], files["server_key"])
    if site.ciphers.startswith("DHE"):
        openssl(folder, f"genpkey -genparam -algorithm DH -pkeyopt group:{site.dh_group} -out dh.pem")
        context.load_dh_params(str(folder / "dh.pem"))
    context.verify_mode = ssl.CERT_REQUIRED if site.asks_for_certificate else ssl.CERT_NONE
    context.load_verify_locations(cadata=(site.client_ca or root().pem).decode())
    if site.version is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = site.version
    keys: dict[str, Any] = {"ca": files["ca"], "cert": files["cert"], "key": files["key"]}
    if site.password:
        keys["key_password_file"] = folder / "password"
        (folder / "password").write_text(site.password)
    archive = an_archive(folder, b"content")
    with ScriptedServer(accept_all, context) as server:
        url = server.url.replace("127.0.0.1", site.host)
        address = f"127.0.0.1:{server.port}"
        destination = a_destination(url, connect_to=address, **keys)
        with a_sender(destination) as sender:
            outcome = sender.send(archive)
        (probe,) = probe_all({"vault": destination})
        tls = ["--cacert", str(files["ca"]), "--cert", str(files["cert"]), "--key", str(files["key"])]
        password = ["--pass", site.password] if site.password else []
        to = ["--connect-to", f"::{address}", "-F", f"file=@{archive}", url]
        command = [require("curl"), "--silent", "--fail", *tls, *password, *to]
        code = subprocess.run(command, check=False, timeout=TIMEOUT).returncode
    assert isinstance(outcome, Delivered | Deferred), outcome
    problems = tls_problems("destination.vault", destination, CertificateLimits(), datetime.now(UTC))
    return Trial(outcome, code, [problem for problem in problems if problem.fatal], probe)


@pytest.mark.parametrize("case", DELIVERED)
def test_backupd_delivers_as_curl_does(tmp_path: Path, case: str) -> None:
    trial = deliver(DELIVERED[case](), tmp_path)
    assert isinstance(trial.outcome, Delivered), trial.outcome
    assert trial.curl == 0
    assert trial.errors == []
    assert trial.probe.reason is None, trial.probe


@pytest.mark.parametrize("case", REFUSED)
def test_backupd_names_the_cause_where_curl_does_not_deliver_either(tmp_path: Path, case: str) -> None:
    make, words = REFUSED[case]
    trial = deliver(make(), tmp_path)
    assert isinstance(trial.outcome, Deferred), trial.outcome
    assert words in trial.outcome.error
    assert trial.curl != 0
    assert trial.probe.reason is trial.outcome.reason
    if trial.outcome.reason is Reason.LOCAL_FILES:  # `check` explains it in the same words
        assert [error.message for error in trial.errors] == [trial.outcome.error]
        assert trial.errors[0].hint == trial.probe.hint
    assert trial.probe.hint
    assert "backupd check" not in trial.probe.hint  # the user runs it already
