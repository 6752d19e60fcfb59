"""Whether a destination's keys and certificates can be used: what they are, and until when."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from backupd.config.destination import DestinationConfig
from backupd.config.key_password import key_password
from backupd.config.problem import Problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import (
        CertificatePublicKeyTypes,
        PrivateKeyTypes,
        PublicKeyTypes,
    )

EXPIRES_SOON: Final = timedelta(days=30)

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_FOR_CLIENTS: Final = frozenset({ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})
_TO_PEM: Final = "openssl x509 -inform der -in {file} -out {file}.pem makes PEM of DER"


class _UnusableError(Exception):
    """A file can't be used; the problem says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class _File:
    """A file and the key of the configuration that names it."""

    where: str
    path: Path

    def problem(self, what: str, hint: str, *, fatal: bool = True) -> Problem:
        return Problem(self.where, f"{self.path} {what}", hint, fatal)

    def unusable(self, what: str, hint: str) -> _UnusableError:
        return _UnusableError(self.problem(what, hint))


def certificate_problems(name: str, destination: DestinationConfig, now: datetime) -> Iterator[Problem]:
    """Tell what is wrong with the certificates and the key of the destination called `name`."""
    if destination.ca:
        yield from _authority_problems(_File(f"destination.{name}.ca", destination.ca), now)
    leaf = None
    if destination.cert:
        file = _File(f"destination.{name}.cert", destination.cert)
        try:
            leaf, *chain = _certificates(file)
        except _UnusableError as unusable:
            yield unusable.problem
        else:
            yield from _date_problems(file, [leaf, *chain], now)
            yield from _purpose_problems(file, leaf)
    if destination.key:
        yield from _key_problems(name, destination, destination.key, leaf)


def expiry(destination: DestinationConfig) -> datetime | None:
    """Return when the client certificate of a destination ends, or the first of its chain, if known."""
    if destination.cert is None:
        return None
    try:
        return min(each.not_valid_after_utc for each in _certificates(_File("cert", destination.cert)))
    except _UnusableError:
        return None


def _authority_problems(file: _File, now: datetime) -> Iterator[Problem]:
    try:
        authorities = _certificates(file)
    except _UnusableError as unusable:
        yield unusable.problem
        return
    problems = list(_date_problems(file, authorities, now))
    expired = [problem for problem in problems if problem.fatal]
    if len(expired) == len(authorities):
        yield from problems
        return
    for problem in problems:  # an old authority beside a good one does no harm
        yield Problem(problem.where, problem.message, problem.hint, fatal=False)


def _date_problems(file: _File, certificates: Sequence[x509.Certificate], now: datetime) -> Iterator[Problem]:
    for certificate in certificates:
        subject = certificate.subject.rfc4514_string() or "a certificate without a subject"
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if end <= now:
            yield file.problem(f"holds {subject}, expired since {end:%Y-%m-%d %H:%M} UTC", "renew it")
        elif begin > now:
            yield file.problem(
                f"holds {subject}, not valid before {begin:%Y-%m-%d %H:%M} UTC",
                "set this host's clock right, or wait",
            )
        elif end - now <= EXPIRES_SOON:
            yield file.problem(
                f"holds {subject}, which expires on {end:%Y-%m-%d}, in {(end - now).days} days",
                "renew it before then",
                fatal=False,
            )


def _purpose_problems(file: _File, leaf: x509.Certificate) -> Iterator[Problem]:
    try:
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return
    if not _FOR_CLIENTS.intersection(purposes):
        yield file.problem(
            "is not meant for clients: its extended key usage lacks clientAuth",
            "servers may refuse it; have one issued with clientAuth",
            fatal=False,
        )


def _key_problems(
    name: str, destination: DestinationConfig, path: Path, leaf: x509.Certificate | None
) -> Iterator[Problem]:
    file = _File(f"destination.{name}.key", path)
    secret = None
    if destination.key_password_file:
        secret = _File(f"destination.{name}.key_password_file", destination.key_password_file)
    for each in (file, secret):
        yield from _exposure(each) if each else ()
    try:
        public = _public(_private_key(file, secret).public_key())
    except _UnusableError as unusable:
        yield unusable.problem
        return
    if leaf and public != _public(leaf.public_key()):
        yield file.problem(
            f"is not the key of the certificate in {destination.cert}", "name the two files of one pair"
        )


def _private_key(file: _File, secret: _File | None) -> "PrivateKeyTypes":
    """Return the key in `file`; nobody is ever asked for a password."""
    content, password = _content(file), _password(secret)
    try:
        return load_pem_private_key(content, password)
    except TypeError:  # a password that is needed and missing, or the other way round
        if secret:
            raise secret.unusable(f"is for {file.path}, which has no password", "leave it out") from None
        raise file.unusable("is encrypted", "name its key_password_file") from None
    except UnsupportedAlgorithm:
        raise file.unusable("holds a kind of key that is not supported", "use RSA or EC") from None
    except ValueError:
        if secret and b"ENCRYPTED" in content:
            raise secret.unusable(f"does not unlock {file.path}", "put the right password there") from None
        raise file.unusable(
            "holds no private key in PEM", 'it must have a part that begins "-----BEGIN … PRIVATE KEY-----"'
        ) from None


def _password(secret: _File | None) -> bytes | None:
    if secret is None:
        return None
    _content(secret)
    password = key_password(secret.path)
    if not password:
        raise secret.unusable("is empty", "put the password of the key there")
    return password


def _certificates(file: _File) -> list[x509.Certificate]:
    """Return the certificates in `file`, at least one."""
    content = _content(file)
    if _CERTIFICATE not in content:
        raise file.unusable("holds no certificate in PEM", _TO_PEM.format(file=file.path))
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise file.unusable("holds a damaged certificate", "copy it anew from where it was issued") from None


def _content(file: _File) -> bytes:
    try:
        return file.path.read_bytes()
    except FileNotFoundError:
        raise file.unusable("does not exist", "put the file there, or name another") from None
    except PermissionError:
        raise file.unusable(
            "is not readable", f"let the daemon's user (uid {os.geteuid()}) read it, folders above included"
        ) from None
    except OSError as error:
        reason = (error.strerror or "unknown fault").lower()
        raise file.unusable(f"can't be read: {reason}", "name a plain file") from None


def _exposure(file: _File) -> Iterator[Problem]:
    """Warn of a secret that others may read; systemd shows its own, guarded otherwise, with group bits."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder and file.path.is_relative_to(folder):
        return
    try:
        mode = stat.S_IMODE(os.stat(file.path).st_mode)
    except OSError:
        return
    if mode & 0o077:
        yield file.problem(
            f"is open to group or others (mode {mode:04o})", f"chmod 0600 {file.path}", fatal=False
        )


def _public(key: "CertificatePublicKeyTypes | PublicKeyTypes") -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
