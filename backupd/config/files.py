"""A look at the folders and files that a configuration names, before anything depends on them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import combinations
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

from backupd.config.models import Config, DestinationConfig, DropConfig
from backupd.config.problems import FileProblem
from backupd.config.rules import overlap
from backupd.core.mountinfo import parse_mountinfo


def key_password(path: Path) -> bytes:
    """Return the password in the file at `path`: its content less the line end."""
    return path.read_bytes().rstrip(b"\r\n")


@dataclass(frozen=True, slots=True)
class FilesReport:
    """The problems of all named files and folders, and when each destination's `cert` file expires.

    `expires` has no entry for a destination without a client certificate, or with an unreadable one.
    """

    problems: tuple[FileProblem, ...]
    expires: Mapping[str, datetime]

    @property
    def fatal(self) -> tuple[FileProblem, ...]:
        """Return the problems that keep the configuration from being run."""
        return tuple(problem for problem in self.problems if problem.fatal and problem.stops)


ExamineFiles = Callable[[], FilesReport]
"""Looks at the configuration file as it is now; raises ConfigError where it can't be read or used."""


EXPIRES_SOON: Final = timedelta(days=30)

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_FOR_CLIENTS: Final = frozenset({ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})
_TO_PEM: Final = "openssl x509 -inform der -in {file} -out {file}.pem makes PEM of DER"


class _UnusableError(Exception):
    """A file can't be used; the problem says why."""

    def __init__(self, problem: FileProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class _File:
    """A file and the key of the configuration that names it."""

    where: str
    path: Path

    def problem(self, what: str, hint: str, *, fatal: bool = True) -> FileProblem:
        return FileProblem(self.where, f"{self.path} {what}", hint, fatal)

    def unusable(self, what: str, hint: str) -> _UnusableError:
        return _UnusableError(self.problem(what, hint))


def certificate_problems(name: str, destination: DestinationConfig, now: datetime) -> Iterator[FileProblem]:
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


def earliest_expiry(destination: DestinationConfig) -> datetime | None:
    """Return when the first certificate in a destination's `cert` file expires: the client's or its chain's.

    None if the destination has no `cert`, or the file can't be read.
    """
    if destination.cert is None:
        return None
    try:
        return min(each.not_valid_after_utc for each in _certificates(_File("cert", destination.cert)))
    except _UnusableError:
        return None


def days_left(end: datetime, now: datetime) -> int:
    """Return the whole days from `now` to `end`, rounded down: 0 on the last day, negative afterwards."""
    return (end - now).days


def _authority_problems(file: _File, now: datetime) -> Iterator[FileProblem]:
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
        yield FileProblem(problem.where, problem.message, problem.hint, fatal=False)


def _date_problems(
    file: _File, certificates: Sequence[x509.Certificate], now: datetime
) -> Iterator[FileProblem]:
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
                f"holds {subject}, which expires on {end:%Y-%m-%d}, in {days_left(end, now)} days",
                "renew it before then",
                fatal=False,
            )


def _purpose_problems(file: _File, leaf: x509.Certificate) -> Iterator[FileProblem]:
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
) -> Iterator[FileProblem]:
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


def _private_key(file: _File, secret: _File | None) -> PrivateKeyTypes:
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


def _exposure(file: _File) -> Iterator[FileProblem]:
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


def _public(key: CertificatePublicKeyTypes | PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


_ALL: Final = os.R_OK | os.W_OK | os.X_OK
_REAL_FOLDER: Final = "put a folder in its place"
_MOUNTS: Final = Path("/proc/self/mountinfo")


def examine_files(config: Config, now: datetime) -> FilesReport:
    """Return what `preflight` says, and when the client certificates expire."""
    ends = {name: earliest_expiry(destination) for name, destination in config.destination.items()}
    expires = {name: end for name, end in ends.items() if end is not None}
    return FilesReport(tuple(file_problems(config, now)), expires)


def file_problems(config: Config, now: datetime) -> list[FileProblem]:
    """Return what is wrong with the folders, keys and certificates of `config` at the time `now`."""
    mounts = mount_points(_MOUNTS)
    return [
        *_state_problems(config),
        *_shared_folders(config),
        *(each for name, drop in config.drop.items() for each in _drop_problems(name, drop, mounts)),
        *(
            each
            for name, destination in config.destination.items()
            for each in certificate_problems(name, destination, now)
        ),
    ]


def mount_points(table: Path) -> frozenset[Path]:
    """Return the mount points in a file such as `/proc/self/mountinfo`; none if it can't be read."""
    try:
        content = table.read_bytes()
    except OSError:
        return frozenset()
    return frozenset(Path(os.fsdecode(entry.mount_point)) for entry in parse_mountinfo(content))


def _state_problems(config: Config) -> Iterator[FileProblem]:
    folder = config.state_dir
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not os.path.isdir(there):
        yield FileProblem("state_dir", f"{there} is not a folder", "name another folder", fatal=True)
    elif not _may(there, _ALL if there == folder else os.W_OK | os.X_OK):
        verb = "written to" if there == folder else "created"
        yield FileProblem("state_dir", f"{folder} can't be {verb}", _let_us(there), fatal=True)
    for name, drop in config.drop.items():
        if overlap(_real(folder), _real(drop.path)):
            yield FileProblem(
                f"drop.{name}.path",
                f"{drop.path} and state_dir {folder} lie within one another",
                "keep the ledger apart from the archives",
                fatal=True,
            )


def _shared_folders(config: Config) -> Iterator[FileProblem]:
    """Tell of drops that symbolic links bring together."""
    for (one, first), (other, second) in combinations(config.drop.items(), 2):
        if overlap(_real(first.path), _real(second.path)):
            yield FileProblem(
                f"drop.{other}.path",
                f"{second.path} and drop.{one}.path {first.path} lie within one another",
                "give every drop a folder of its own",
                fatal=True,
            )


def _drop_problems(name: str, drop: DropConfig, mounts: frozenset[Path]) -> Iterator[FileProblem]:
    where = f"drop.{name}.path"
    if problem := _folder_problem(where, drop.path):
        yield problem
        return
    folders = [("rejected_dir", drop.rejected_dir)]
    if drop.on_delivered == "move":
        folders.append(("sent_dir", drop.sent_dir))
    for key, relative in folders:
        problem = _subfolder_problem(f"drop.{name}.{key}", drop.path, relative, mounts)
        if problem:
            yield problem


def _folder_problem(where: str, folder: Path) -> FileProblem | None:
    """Return what keeps us from taking files out of `folder`, if anything does."""
    try:
        mode = os.stat(folder).st_mode
    except FileNotFoundError:
        return FileProblem(
            where, f"{folder} does not exist", f"mkdir -p {folder}, or name another", fatal=True
        )
    except OSError as error:
        reason = (error.strerror or "unknown fault").lower()
        return FileProblem(where, f"{folder} can't be reached: {reason}", _let_us(folder.parent), fatal=True)
    if not stat.S_ISDIR(mode):
        return FileProblem(
            where, f"{folder} is not a folder", "name the folder that archives come to", fatal=True
        )
    if not _may(folder, _ALL):
        return FileProblem(
            where, f"{folder} can't be read, written and searched", _let_us(folder), fatal=True
        )
    return None


def _subfolder_problem(where: str, root: Path, relative: str, mounts: frozenset[Path]) -> FileProblem | None:
    """Return what keeps us from moving files from `root` to the folder below it, if anything does."""
    device = os.stat(root).st_dev
    here = root
    for part in relative.split("/"):
        here /= part
        if not os.path.lexists(here):
            return None  # it will be made
        if os.path.islink(here):
            return FileProblem(
                where,
                f"{here} is a symbolic link, which is never followed",
                _REAL_FOLDER,
                fatal=True,
                stops=False,
            )
        if problem := _folder_problem(where, here):
            return replace(problem, stops=False)
        if os.stat(here).st_dev != device or _real(here) in mounts:
            return FileProblem(
                where,
                f"{here} is on another filesystem than {root}",
                "archives are moved by renaming them; name a folder on the same filesystem",
                fatal=True,
            )
    return None


def _let_us(folder: Path) -> str:
    return f"let the daemon's user (uid {os.geteuid()}) read, write and search {folder}"


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
