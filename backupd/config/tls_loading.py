"""Loads the authorities, the certificate and the key of one side of TLS, and explains what OpenSSL refuses.

Uploads, the metrics' server and `backupd check` load the files with the same functions, so all have the same
opinion of them.
"""

from __future__ import annotations

import binascii
import os
import re
import ssl
import stat
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from backupd.config.certificate_facts import CertificateFacts, first_value
from backupd.config.models import TlsFiles
from backupd.core.errors import ConfigError

_MAX_PASSWORD_BYTES: Final = 1024
"""The longest password that OpenSSL takes."""

_CERTIFICATE: Final = re.compile(
    rb"^(?:\xef\xbb\xbf)?-----BEGIN ((?:TRUSTED |X509 )?CERTIFICATE)-----[ \t\r]*\n(.*?)^-----END \1-----",
    re.DOTALL | re.MULTILINE,
)
"""A certificate in PEM; OpenSSL ignores one that does not begin at the start of a line, as in a comment."""


class TlsFilesError(ConfigError):
    """The CA, the certificate or the private key can't be used; `key` names the file in its table."""

    def __init__(self, key: str, path: Path, text: str, hint: str) -> None:
        super().__init__(f"{path} {text}", hint)
        self.key = key


def load_authorities(context: ssl.SSLContext, ca: Path | None) -> None:
    """Trust the authorities in the file `ca`, those of the system without one; raises TlsFilesError."""
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return
    content = read_tls_file("ca", ca)
    # `ca` may be the authority that issued the server's certificate, or that certificate, and not the root
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cafile=ca)
    except OSError as error:
        raise TlsFilesError("ca", ca, *_fault_of_layout("certificate", ca, content)) from error
    if not _CERTIFICATE.search(content):  # but certificate revocation lists
        raise TlsFilesError("ca", ca, *_fault_of_layout("certificate", ca, content))


def load_certificate(context: ssl.SSLContext, files: TlsFiles) -> bool:
    """Load the own certificate and its key, if there are any; return whether the key is encrypted.

    Raises TlsFilesError.
    """
    if files.cert is None or files.key is None:
        return False
    for name, path in (("cert", files.cert), ("key", files.key)):
        read_tls_file(name, path)
    passwords: list[bytes] = []

    def password() -> bytes:
        passwords.append(_password(files))
        return passwords[-1]

    try:
        context.load_cert_chain(files.cert, files.key, password=password)
    except OSError as error:
        raise _refused(files.cert, files.key, files.key_password_file, passwords, error) from error
    return bool(passwords)


def read_tls_file(key: str, path: Path) -> bytes:
    """Return the content of the file that `key` names; raises TlsFilesError.

    Only that of a regular file: reading a FIFO or a device may never end.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise TlsFilesError(key, path, "is not a regular file", "name a regular file, or a link to one")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TlsFilesError(key, path, "does not exist", "create the file, or name another one") from error
    except PermissionError as error:
        hint = f"permit the daemon's user (uid {os.geteuid()}) to read it and to search the folders above"
        raise TlsFilesError(key, path, "is not readable", hint) from error
    except OSError as error:
        text = f"can't be read: {(error.strerror or 'unknown error').lower()}"
        raise TlsFilesError(key, path, text, "name a regular file") from error


def certificates(content: bytes) -> list[CertificateFacts]:
    """Return the facts of the certificates in a PEM file, in their order.

    OpenSSL reads those with the labels TRUSTED CERTIFICATE and X509 CERTIFICATE as well; the former have its
    trust settings appended.
    """
    return [_facts(found[2]) for found in _CERTIFICATE.finditer(content)]


def _facts(block: bytes) -> CertificateFacts:
    try:
        return CertificateFacts.of(first_value(binascii.a2b_base64(block)))
    except ValueError:
        return CertificateFacts()


def _password(files: TlsFiles) -> bytes:
    """Return the password of an encrypted key: the content of its file without the line end."""
    path = files.key_password_file
    if path is None:  # without a password callback, OpenSSL would prompt on the terminal
        assert files.key is not None  # noqa: S101 -- there is a key that is encrypted
        raise TlsFilesError(
            "key", files.key, "is encrypted", "set key_password_file to the file with its password"
        )
    password = read_tls_file("key_password_file", path).rstrip(b"\r\n")
    if not password:
        raise TlsFilesError("key_password_file", path, "is empty", "put the password of the key there")
    if len(password) > _MAX_PASSWORD_BYTES:
        raise TlsFilesError(
            "key_password_file",
            path,
            f"has {len(password)} bytes, and the password of a key has at most {_MAX_PASSWORD_BYTES}",
            "put the password there, and nothing else",
        )
    return password


def _refused(
    cert: Path, key: Path, password_file: Path | None, passwords: list[bytes], error: OSError
) -> TlsFilesError:
    """Return the error for a certificate and a key that OpenSSL does not load; it names the file at fault."""
    reason = getattr(error, "reason", None) or ""
    password = passwords[-1] if passwords else None
    if "MISMATCH" in reason or reason == "NO_CERTIFICATE_ASSIGNED":  # the latter for a key of another kind
        return TlsFilesError("key", key, *_mismatch(cert, key, password))
    for part, (text, hint) in _WEAKNESSES.items():
        if part in reason:
            return TlsFilesError("cert", cert, text, hint)
    if not _holds_certificates(cert):
        return TlsFilesError("cert", cert, *_fault_of_layout("certificate", cert, cert.read_bytes()))
    if password is None or password_file is None:
        return TlsFilesError("key", key, *_fault_of_layout("private key", key, key.read_bytes()))
    if _is_encryption_outdated(key.read_bytes(), password):
        return TlsFilesError(
            "key",
            key,
            "is encrypted with an old algorithm, such as DES or RC2, which OpenSSL does not support any more",
            f"encrypt it again, and name the new file: openssl pkey -in {key} -aes256 -provider legacy"
            f" -provider default -out {key}.new",
        )
    return TlsFilesError(
        "key_password_file",
        password_file,
        f"does not have the password of {key}",
        f"put the right password there; openssl pkey -in {key} -noout tests one",
    )


_WEAKNESSES: Final = {
    "EE_KEY_TOO_SMALL": (
        "contains a certificate with a key that is shorter than OpenSSL accepts on this host",
        "have a certificate issued for a new key, RSA of 2048 bits or more, or EC",
    ),
    "CA_KEY_TOO_SMALL": (
        "contains an issuer with a key that is shorter than OpenSSL accepts on this host",
        "have a certificate issued by an authority with RSA of 2048 bits or more, or EC",
    ),
    "MD_TOO_WEAK": (
        "contains a certificate signed with an old digest such as SHA-1, which OpenSSL refuses on this host",
        "have it issued again, signed with SHA-256",
    ),
}
"""Text and hint for a part of OpenSSL's reason."""


def _holds_certificates(path: Path) -> bool:
    """Return whether OpenSSL can read the certificates in a PEM file."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except OSError:
        return False
    return True


def _mismatch(cert: Path, key: Path, password: bytes | None) -> tuple[str, str]:
    """Return text and hint for a key that is not that of the first certificate."""
    public_keys = [each.public_key for each in certificates(cert.read_bytes())]
    own = _key_of(key.read_bytes(), password)
    own_public = own and own.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if own_public is not None and own_public in public_keys:
        number = public_keys.index(own_public) + 1
        return (
            f"is the key of certificate {number} in {cert}, and has to be that of the first",
            "put the certificate of this key first in that file, then the one that issued it, and so on",
        )
    return f"is not the key of the certificate in {cert}", "set cert and key to the two files of one pair"


def _is_encryption_outdated(content: bytes, password: bytes) -> bool:
    """Return whether a key that OpenSSL can't decrypt needs an algorithm that it has no more."""
    is_outdated = re.search(rb"^DEK-Info: *(DES-(?!EDE3)|RC2|IDEA|SEED|BF|CAST)", content, re.MULTILINE)
    return bool(is_outdated) or _key_of(content, password) is not None  # by cryptography's own OpenSSL


def _key_of(content: bytes, password: bytes | None) -> PrivateKeyTypes | None:
    try:
        return load_pem_private_key(content, password)
    except Exception:  # noqa: BLE001 -- cryptography has many, and the fault is known without the key
        return None


_LAYOUTS: Final = (
    (rb"\A(\xff\xfe|\xfe\xff)", "is in UTF-16", "iconv -f UTF-16 -t ASCII {0} > {0}.pem"),
    (
        rb"\A[^\n]*-----BEGIN [^\n]*\r[^\n]*\Z",
        "has lines that end with CR alone",
        r"tr '\r' '\n' < {0} > {0}.pem",
    ),
    (rb"(?m)^[ \t]+-----BEGIN ", "is indented", "sed 's/^[[:blank:]]*//' {0} > {0}.pem"),
    (
        rb"(?m)^-----BEGIN .*\n([\w+/=]+[ \t\r]*\n)*[ \t\r]*\n[\w+/=]",
        "has blank lines within its PEM",
        "sed '/^[[:space:]]*$/d' {0} > {0}.pem",
    ),
    (
        rb"-----BEGIN (NEW )?CERTIFICATE REQUEST-----",
        "contains a certificate request",
        "name the certificate that the authority has issued for it",
    ),
    (
        rb"-----BEGIN OPENSSH PRIVATE KEY-----",
        "is in the format of OpenSSH",
        "cp {0} {0}.pem && ssh-keygen -p -m PKCS8 -f {0}.pem",
    ),
    (
        rb"\A\xfe\xed\xfe\xed",
        "is a Java key store",
        "keytool -importkeystore -srckeystore {0} -destkeystore {0}.p12 -deststoretype pkcs12; name that",
    ),
)
"""Pattern, text and hint for a file that OpenSSL does not read as PEM; `{0}` is its path."""

_BEGIN: Final = {
    "certificate": rb"(?m)^(\xef\xbb\xbf)?-----BEGIN (TRUSTED |X509 )?CERTIFICATE-----[ \t\r]*$",
    "private key": rb"(?m)^(\xef\xbb\xbf)?-----BEGIN ([A-Z ]+ )?PRIVATE KEY-----[ \t\r]*$",
}


def _fault_of_layout(noun: str, path: Path, content: bytes) -> tuple[str, str]:
    """Return text and hint for a file in which OpenSSL finds no certificate or key, as `noun` says."""
    for pattern, text, hint in _LAYOUTS:
        if re.search(pattern, content):
            return text, hint.format(path)
    if re.search(_BEGIN[noun], content):
        return f"contains a damaged {noun}", "copy it again from its issuer"
    return f"contains no {noun} in PEM", _conversion(noun, path, content)


_VERSION_3: Final = b"\x02\x01\x03"
"""The version in PKCS#12, with which its only SEQUENCE begins."""

_PKCS7_SIGNED_DATA: Final = bytes.fromhex("2a864886f70d010702")
_PKCS12_LEGACY: Final = re.compile(rb"\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01[\x01\x02\x05\x06]")
"""The algorithms of PKCS#12 with RC4 or RC2; source: RFC 7292 appendix C."""


def _conversion(noun: str, path: Path, content: bytes) -> str:
    """Return the command that makes a PEM file from one in another format."""
    is_certificate = noun == "certificate"
    if content.startswith(b"\x30") and _VERSION_3 in content[:8]:
        part = "-nokeys" if is_certificate else "-nocerts -nodes"
        legacy = " -legacy" if _PKCS12_LEGACY.search(content) else ""
        key = "cert" if is_certificate else "key"
        return f"it is in PKCS#12: openssl pkcs12 -in {path} {part}{legacy} -out {path}.{key}.pem"
    is_pkcs7_der = content.startswith(b"\x30") and _PKCS7_SIGNED_DATA in content[:30]
    if is_pkcs7_der or b"-----BEGIN PKCS7-----" in content:
        form = " -inform der" if is_pkcs7_der else ""
        return f"it is in PKCS#7: openssl pkcs7{form} -print_certs -in {path} -out {path}.pem"
    if content.startswith(b"\x30"):
        command = "x509" if is_certificate else "pkey"
        return f"if it is in DER: openssl {command} -inform der -in {path} -out {path}.pem"
    kind = "CERTIFICATE" if is_certificate else "… PRIVATE KEY"
    return f'it must have a line that begins "-----BEGIN {kind}-----"'
