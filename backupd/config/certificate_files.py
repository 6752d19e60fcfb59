"""Checks of the certificates and private keys that a configuration names, and their expiry."""

from __future__ import annotations

import binascii
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificatePublicKeyTypes,
    PrivateKeyTypes,
    PublicKeyTypes,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from backupd.config.models import TlsFiles
from backupd.config.problems import FileProblem, NamedPath, UnusableFileError, error_text
from backupd.core.certificate_life import CertificateLife, CertificateLimits, CertificateState, Validity

_PEM_CERTIFICATE: Final = re.compile(
    rb"-----BEGIN ((?:TRUSTED |X509 )?CERTIFICATE)-----\s(.*?)-----END \1-----", re.DOTALL
)
_PEM_BEGIN: Final = re.compile(rb"-----BEGIN (?:TRUSTED |X509 )?CERTIFICATE-----")
_DER_HEAD: Final = 4
_TWO_LENGTH_BYTES: Final = 0x82
"""The second byte in DER of a value of 256 to 65,535 bytes, as nearly every certificate is."""
_CLIENT_PURPOSES: Final = frozenset(
    {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
)


def tls_problems(
    name: str, destination: TlsFiles, limits: CertificateLimits, now: datetime
) -> Iterator[FileProblem]:
    """Yield the problems of the certificates and the private key of the destination `name`."""
    if destination.ca:
        yield from _authority_problems(NamedPath(f"destination.{name}.ca", destination.ca), limits, now)
    client, chain = None, list[x509.Certificate]()
    if destination.cert:
        file = NamedPath(f"destination.{name}.cert", destination.cert)
        try:
            client, *chain = _certificates(file)
        except UnusableFileError as unusable:
            yield unusable.problem
        else:
            yield from _date_problems(file, [client], limits, now)
            # servers need no certificate of the chain that they trust, such as that of a cross-signed root
            yield from (replace(problem, fatal=False) for problem in _date_problems(file, chain, limits, now))
            yield from _purpose_problems(file, client)
    if destination.key:
        yield from _key_problems(name, destination, destination.key, [client, *chain] if client else [])


def client_validity(destination: TlsFiles, limits: CertificateLimits, now: datetime) -> Validity | None:
    """Return the validity of the client certificate in `cert`, or of that of its chain which ends first.

    One of the chain that has expired before `now` does not count, as servers do without it. None if the
    destination has no `cert`, or the file can't be read.
    """
    if destination.cert is None:
        return None
    try:
        client, *chain = _certificates(NamedPath("cert", destination.cert))
    except UnusableFileError:
        return None
    valid = [client, *(each for each in chain if each.not_valid_after_utc > now)]
    return min(map(_validity, valid), key=lambda validity: _urgency(limits.life(validity, now)))


def _validity(certificate: x509.Certificate) -> Validity:
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def _urgency(life: CertificateLife) -> timedelta:
    """Return the time until the warning, negative after it."""
    return life.left - life.limits.warning


def key_password(path: Path) -> bytes:
    """Return the password in the file at `path`: its content without the line end."""
    return path.read_bytes().rstrip(b"\r\n")


def _authority_problems(file: NamedPath, limits: CertificateLimits, now: datetime) -> Iterator[FileProblem]:
    try:
        authorities = _certificates(file)
    except UnusableFileError as unusable:
        yield unusable.problem
        return
    problems = list(_date_problems(file, authorities, limits, now))
    # an expired authority does no harm if another one in the file is valid
    is_fatal = sum(problem.fatal for problem in problems) == len(authorities)
    for problem in problems:
        yield FileProblem(problem.where, problem.message, problem.hint, problem.fatal and is_fatal)


def _date_problems(
    file: NamedPath, certificates: Sequence[x509.Certificate], limits: CertificateLimits, now: datetime
) -> Iterator[FileProblem]:
    for certificate in certificates:
        subject = certificate.subject.rfc4514_string() or "a certificate without a subject"
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if end <= now:
            yield file.problem(
                f"contains {subject}, which expired on {end:%Y-%m-%d at %H:%M} UTC", "renew the certificate"
            )
        elif start > now:
            yield file.problem(
                f"contains {subject}, which is not valid before {start:%Y-%m-%d %H:%M} UTC",
                "correct the clock of this host, or wait",
            )
        elif (life := limits.life(_validity(certificate), now)).state is not CertificateState.VALID:
            when = f"on {end:%Y-%m-%d}" if life.days_left else f"at {end:%H:%M} UTC"
            yield file.problem(
                f"contains {subject}, which expires {when}, in {life}",
                "renew the certificate before then",
                fatal=False,
            )


def _purpose_problems(file: NamedPath, client: x509.Certificate) -> Iterator[FileProblem]:
    try:
        purposes = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return
    if not _CLIENT_PURPOSES.intersection(purposes):
        yield file.problem(
            "is not a client certificate: its extended key usage lacks clientAuth",
            "have a certificate with clientAuth issued; servers may refuse this one",
            fatal=False,
        )


def _key_problems(
    name: str, destination: TlsFiles, path: Path, certificates: Sequence[x509.Certificate]
) -> Iterator[FileProblem]:
    """Yield the problems of a private key; `certificates` are those of `cert`, the client's first."""
    key_file = NamedPath(f"destination.{name}.key", path)
    password_file = None
    if destination.key_password_file:
        password_file = NamedPath(f"destination.{name}.key_password_file", destination.key_password_file)
    for file in (key_file, password_file):
        yield from _mode_problems(file) if file else ()
    try:
        public_key = _public_bytes(_private_key(key_file, password_file).public_key())
    except UnusableFileError as unusable:
        yield unusable.problem
        return
    keys = [_public_bytes(each.public_key()) for each in certificates]
    if public_key in keys[1:] and public_key != keys[0]:
        number = keys.index(public_key) + 1
        yield key_file.problem(
            f"is the key of certificate {number} in {destination.cert}, and has to be that of the first",
            "put the client certificate first in that file, then the one that issued it, and so on",
        )
    elif keys and public_key != keys[0]:
        yield key_file.problem(
            f"is not the key of the certificate in {destination.cert}",
            "set cert and key to the two files of one pair",
        )


def _private_key(key_file: NamedPath, password_file: NamedPath | None) -> PrivateKeyTypes:
    """Return the key in a file, decrypted with the password in the other one."""
    content, password = _content(key_file), _password(password_file)
    try:
        return load_pem_private_key(content, password)
    except TypeError:  # either a password is needed and missing, or there is one and none is needed
        if password_file:
            raise password_file.unusable(
                f"has a password for {key_file.path}, which is not encrypted", "remove key_password_file"
            ) from None
        raise key_file.unusable(
            "is encrypted", "set key_password_file to the file with its password"
        ) from None
    except UnsupportedAlgorithm:
        raise key_file.unusable("contains an unsupported type of key", "use an RSA or EC key") from None
    except ValueError:
        if password_file and b"ENCRYPTED" in content:
            raise password_file.unusable(
                f"does not have the password of {key_file.path}", "put the right password there"
            ) from None
        raise key_file.unusable(
            "contains no private key in PEM", _conversion(key_file.path, content, "key")
        ) from None


def _password(file: NamedPath | None) -> bytes | None:
    if file is None:
        return None
    _content(file)
    password = key_password(file.path)
    if not password:
        raise file.unusable("is empty", "put the password of the key there")
    return password


def _certificates(file: NamedPath) -> list[x509.Certificate]:
    """Return the certificates in a PEM file, at least one; raise UnusableFileError if there is none.

    OpenSSL reads those with the labels TRUSTED CERTIFICATE and X509 CERTIFICATE as well; the former have its
    trust settings appended.
    """
    content = _content(file)
    blocks = [found[2] for found in _PEM_CERTIFICATE.finditer(content)]
    begun = len(_PEM_BEGIN.findall(content))
    if not begun:
        raise file.unusable("contains no certificate in PEM", _conversion(file.path, content, "cert"))
    try:
        if len(blocks) < begun:
            raise ValueError("a certificate is cut")
        return [x509.load_der_x509_certificate(_first_value(binascii.a2b_base64(each))) for each in blocks]
    except ValueError:
        raise file.unusable("contains a damaged certificate", "copy it again from its issuer") from None


def _first_value(der: bytes) -> bytes:
    """Return the first value in DER, without what follows; raise ValueError if it is cut."""
    if len(der) < _DER_HEAD or der[1] != _TWO_LENGTH_BYTES:
        return der
    length = _DER_HEAD + int.from_bytes(der[2:_DER_HEAD], "big")
    if len(der) < length:
        raise ValueError("the value is cut")
    return der[:length]


def _conversion(path: Path, content: bytes, key: str) -> str:
    """Return the command that makes the PEM file for `cert` or `key` from one in another format."""
    if content.startswith(b"\x30") and b"\x02\x01\x03" in content[:8]:  # a SEQUENCE with the version 3
        part = "-nokeys" if key == "cert" else "-nocerts -nodes"
        return f"it is in PKCS#12: openssl pkcs12 -in {path} {part} -out {path}.{key}.pem"
    if b"-----BEGIN PKCS7-----" in content:
        return f"it is in PKCS#7: openssl pkcs7 -print_certs -in {path} -out {path}.pem"
    if content.startswith(b"\x30"):
        command = "x509" if key == "cert" else "pkey"
        return f"if it is in DER: openssl {command} -inform der -in {path} -out {path}.pem"
    kind = "CERTIFICATE" if key == "cert" else "… PRIVATE KEY"
    return f'it must have a line that begins "-----BEGIN {kind}-----"'


def _content(file: NamedPath) -> bytes:
    try:
        return file.path.read_bytes()
    except FileNotFoundError:
        raise file.unusable("does not exist", "create the file, or name another one") from None
    except PermissionError:
        raise file.unusable(
            "is not readable",
            f"permit the daemon's user (uid {os.geteuid()}) to read it and to search the folders above",
        ) from None
    except OSError as error:
        raise file.unusable(f"can't be read: {error_text(error)}", "name a regular file") from None


def _mode_problems(file: NamedPath) -> Iterator[FileProblem]:
    """Warn of a secret that other users may read.

    systemd protects the folder of its credentials, and gives the files in it group bits.
    """
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and file.path.is_relative_to(credentials):
        return
    try:
        mode = stat.S_IMODE(os.stat(file.path).st_mode)
    except OSError:
        return
    if mode & 0o077:
        yield file.problem(
            f"is accessible to group or others (mode {mode:04o})", f"chmod 0600 {file.path}", fatal=False
        )


def _public_bytes(key: CertificatePublicKeyTypes | PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
