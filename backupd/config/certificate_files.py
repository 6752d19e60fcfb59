"""Checks of the certificates and private keys that a configuration names, and their expiry."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography.x509.oid import ExtendedKeyUsageOID

from backupd.config.certificate_facts import CertificateFacts
from backupd.config.models import DestinationConfig, TlsFiles
from backupd.config.problems import FileProblem, NamedPath
from backupd.config.tls_loading import (
    TlsFilesError,
    certificates,
    load_authorities,
    load_certificate,
    read_tls_file,
)
from backupd.core.certificate_life import CertificateLife, CertificateLimits, CertificateState, Validity
from backupd.core.units import local_time

_PURPOSES: Final = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}


def tls_problems(
    table: str, files: TlsFiles, limits: CertificateLimits, now: datetime, role: str = "client"
) -> Iterator[FileProblem]:
    """Yield the problems of the certificates and the private key that the keys of a table name.

    OpenSSL decides whether they can be used, as for an upload. `role` is `client` or `server`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if files.ca:
        try:
            load_authorities(context, files.ca)
        except TlsFilesError as error:
            yield _problem(table, error)
        yield from _authority_problems(NamedPath(f"{table}.ca", files.ca), limits, now)
    if files.cert and files.key:
        yield from _certificate_problems(NamedPath(f"{table}.cert", files.cert), limits, now, role)
        yield from mode_problems(NamedPath(f"{table}.key", files.key))
        if files.key_password_file:
            yield from mode_problems(NamedPath(f"{table}.key_password_file", files.key_password_file))
        unreadable = list(_unreadable_files(table, {"cert": files.cert, "key": files.key}))
        yield from unreadable or _pair_problems(table, context, files, files.key)


def client_validity(files: TlsFiles, limits: CertificateLimits, now: datetime) -> Validity | None:
    """Return the validity of the client certificate in `cert`, or of that of its chain which ends first.

    One of the chain that has expired before `now` does not count, as servers do without it. None if there is
    no `cert`, or it can't be read.
    """
    client, *chain = [each.validity for each in _certificates(files.cert)] or [None]
    valid = [client, *(each for each in chain if each and each.ends > now)]
    known = (validity for validity in valid if validity is not None)
    return min(known, key=lambda validity: _urgency(limits.life(validity, now)), default=None)


def first_to_renew(
    destination: DestinationConfig, limits: CertificateLimits, now: datetime
) -> tuple[Path, Validity] | None:
    """Return the file and validity of the client certificate that needs a renewal first.

    A destination has up to two: its own, and that for its token endpoint.
    """
    found = [
        (files.cert, validity)
        for files in (destination.tls_files, destination.sign_in_tls_files)
        if files and files.cert and (validity := client_validity(files, limits, now))
    ]
    return min(found, key=lambda each: _urgency(limits.life(each[1], now)), default=None)


def end_of(validity: Validity, life: CertificateLife) -> str:
    """Return when a certificate expires, such as `on 2030-06-15, in 13 days`; on its last day, the time."""
    when = f"on {validity.ends:%Y-%m-%d}" if life.days_left else f"at {local_time(validity.ends)}"
    return f"{when}, in {life}"


def _urgency(life: CertificateLife) -> timedelta:
    """Return the time until the warning, negative after it."""
    return life.left - life.limits.warning


def _problem(table: str, error: TlsFilesError) -> FileProblem:
    return FileProblem(f"{table}.{error.key}", error.message, error.hint, fatal=True)


def _certificates(path: Path | None) -> list[CertificateFacts]:
    """Return the facts of the certificates in a PEM file, none if it can't be read."""
    try:
        return certificates(read_tls_file("cert", path)) if path else []
    except TlsFilesError:
        return []


def _authority_problems(file: NamedPath, limits: CertificateLimits, now: datetime) -> Iterator[FileProblem]:
    authorities = _certificates(file.path)
    problems = list(_date_problems(file, authorities, limits, now))
    # an expired authority does no harm if another one in the file is valid
    is_fatal = sum(problem.fatal for problem in problems) == len(authorities)
    yield from (replace(problem, fatal=problem.fatal and is_fatal) for problem in problems)


def _certificate_problems(
    file: NamedPath, limits: CertificateLimits, now: datetime, role: str
) -> Iterator[FileProblem]:
    found = _certificates(file.path)
    yield from _date_problems(file, found[:1], limits, now)
    # servers need no certificate of the chain that they trust, such as that of a cross-signed root
    yield from (replace(problem, fatal=False) for problem in _date_problems(file, found[1:], limits, now))
    purposes = found[0].purposes if found else None
    if purposes is not None and not {_PURPOSES[role], ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & purposes:
        other = "servers" if role == "client" else "clients"
        yield file.problem(
            f"is not a {role} certificate: its extended key usage lacks {role}Auth",
            f"have a certificate with {role}Auth issued; {other} may refuse this one",
            fatal=False,
        )


def _date_problems(
    file: NamedPath, found: Sequence[CertificateFacts], limits: CertificateLimits, now: datetime
) -> Iterator[FileProblem]:
    for certificate in found:
        subject = certificate.subject or "a certificate without a subject"
        validity = certificate.validity
        if validity is None:
            yield file.problem(
                "contains a certificate of which the dates can't be read, so no warning precedes its end",
                f"if it is damaged, copy it again from its issuer: openssl x509 -in {file.path} -noout -text",
                fatal=False,
            )
        elif validity.ends <= now:
            yield file.problem(
                f"contains {subject}, which expired on {local_time(validity.ends)}",
                "renew the certificate",
            )
        elif validity.begins > now:
            yield file.problem(
                f"contains {subject}, which is not valid before {local_time(validity.begins)}",
                "correct the clock of this host, or wait",
            )
        elif (life := limits.life(validity, now)).state is not CertificateState.VALID:
            yield file.problem(
                f"contains {subject}, which expires {end_of(validity, life)}",
                "renew the certificate before then",
                fatal=False,
            )


def _unreadable_files(table: str, paths: Mapping[str, Path]) -> Iterator[FileProblem]:
    for key, path in paths.items():
        try:
            read_tls_file(key, path)
        except TlsFilesError as error:
            yield _problem(table, error)


def _pair_problems(table: str, context: ssl.SSLContext, files: TlsFiles, key: Path) -> Iterator[FileProblem]:
    """Yield the problem of a client certificate and its key that OpenSSL finds, or that of the password."""
    try:
        is_encrypted = load_certificate(context, files)
    except TlsFilesError as error:
        yield _problem(table, error)
        return
    if files.key_password_file and not is_encrypted:
        yield NamedPath(f"{table}.key_password_file", files.key_password_file).problem(
            f"is not needed: {key} is not encrypted", "remove key_password_file", fatal=False
        )


def mode_problems(file: NamedPath) -> Iterator[FileProblem]:
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
