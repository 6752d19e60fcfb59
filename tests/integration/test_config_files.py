"""Checks of the files and folders that a configuration names."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backupd.config.certificate_files import client_validity
from backupd.config.files import examine_files, file_problems, mount_entries
from backupd.config.models import Config, DropConfig, HttpDestinationConfig, MetricsConfig
from backupd.config.problems import FileProblem
from backupd.config.tls_loading import TlsFilesError
from backupd.core.certificate_life import CertificateLimits
from backupd.core.units import local_time
from backupd.upload.http.tls import make_context
from tests.odd_certificates import altered, with_private_extensions
from tests.privileges import IS_ROOT
from tests.programs import require

NOW = datetime(2030, 6, 1, 12, tzinfo=UTC)
NOBODY = 65534


@pytest.fixture(autouse=True)
def _no_credentials_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder that every user can reach, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="backupd-"))
    folder.chmod(0o777)
    (folder / "drop").mkdir()
    (folder / "drop").chmod(0o777)
    yield folder
    for root, inner, _ in os.walk(folder):
        for name in inner:
            Path(root, name).chmod(0o777)
    shutil.rmtree(folder)


@pytest.fixture
def as_a_plain_user() -> Iterator[None]:
    """Run a test without root's right to ignore permissions."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def as_root() -> Iterator[None]:
    """Be root again within `as_a_plain_user`."""
    before = os.geteuid()
    os.seteuid(0)
    try:
        yield
    finally:
        os.seteuid(before)


def a_config(
    place: Path, drop: DropConfig | None = None, destination: HttpDestinationConfig | None = None
) -> Config:
    return Config(
        state_dir=place / "state",
        drop={"d": drop or DropConfig(path=place / "drop")},
        destination={"v": destination or HttpDestinationConfig(url="https://vault.example.net/")},
    )


def only(config: Config, now: datetime = NOW) -> FileProblem:
    (problem,) = file_problems(config, now)
    return problem


def an_error(config: Config) -> str:
    problem = only(config)
    assert problem.fatal
    assert problem.hint
    return f"{problem.where}: {problem.message}"


def a_warning(config: Config, now: datetime = NOW) -> str:
    problem = only(config, now)
    assert not problem.fatal
    assert problem.hint
    return f"{problem.where}: {problem.message}"


class TestPlaces:
    def test_the_place_of_a_drop_folder_is_the_one_that_a_link_leads_to(self, place: Path) -> None:
        (place / "link").symlink_to(place / "drop")
        report = examine_files(a_config(place, DropConfig(path=place / "link")), NOW)
        assert report.places == examine_files(a_config(place), NOW).places
        assert report.places["d"].path == str(place / "drop")
        assert report.places["d"].inode == (place / "drop").stat().st_ino

    def test_a_folder_that_cannot_be_reached_has_no_numbers(self, place: Path) -> None:
        (found,) = examine_files(a_config(place, DropConfig(path=place / "none")), NOW).places.values()
        assert (found.filesystem, found.inode) == (None, None)

    @pytest.mark.root
    def test_the_inode_of_the_root_of_a_mount_is_not_used(self, place: Path) -> None:
        if subprocess.run(["mount", "-t", "tmpfs", "none", str(place / "drop")], check=False).returncode:
            pytest.skip("no filesystem can be mounted here")
        try:
            (place / "drop/below").mkdir()
            below = a_config(place, DropConfig(path=place / "drop/below"))
            (inner,) = examine_files(below, NOW).places.values()
            (root,) = examine_files(a_config(place), NOW).places.values()
        finally:
            subprocess.run(["umount", "-l", str(place / "drop")], check=True)
        assert (root.filesystem, root.inode) == (inner.filesystem, None)
        assert inner.inode is not None

    def test_disks_with_the_same_device_number_are_told_apart(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = examine_files(a_config(place), NOW).places["d"]
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_fsid=1 << 63))
        second = examine_files(a_config(place), NOW).places["d"]
        assert first.inode == second.inode
        assert not first.has_numbers_of(second)


class TestFolders:
    def test_a_cache_time_that_is_not_visible_is_a_problem_until_stable_for_is_set(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (place / "mountinfo").write_text(f"7 1 0:40 / {place.resolve()} rw - fuse.rclone remote: rw\n")
        monkeypatch.setattr("backupd.config.files._MOUNTINFO", place / "mountinfo")
        default, explicit = a_config(place), DropConfig(path=place / "drop", stable_for=timedelta(hours=1))
        found = {problem.where: problem for problem in file_problems(default, NOW)}
        assert not found["drop.d.stable_for"].fatal
        assert "a longer --dir-cache-time makes a growing file" in found["drop.d.stable_for"].message
        assert found["drop.d.stable_for"].hint.endswith('with the default of --dir-cache-time, to "305s"')
        assert [p.where for p in file_problems(a_config(place, explicit), NOW)] == ["drop.d.path"]

    def test_folders_that_can_be_used_are_no_problem(self, place: Path) -> None:
        (place / "drop/sent").mkdir()
        (place / "state").mkdir()
        assert file_problems(a_config(place), NOW) == []

    def test_a_missing_drop_folder_has_a_hint_that_creates_it(self, place: Path) -> None:
        config = a_config(place, DropConfig(path=place / "none"))
        assert an_error(config) == f"drop.d.path: {place}/none does not exist"
        assert str(only(config)).endswith(f"hint: mkdir -p {place}/none, or name another folder")

    def test_a_file_is_not_a_drop_folder(self, place: Path) -> None:
        (place / "file").touch()
        config = a_config(place, DropConfig(path=place / "file"))
        assert an_error(config) == f"drop.d.path: {place}/file is not a folder"

    def test_a_path_through_a_file_can_not_be_reached(self, place: Path) -> None:
        (place / "file").touch()
        config = a_config(place, DropConfig(path=place / "file/drop"))
        assert an_error(config) == f"drop.d.path: {place}/file/drop can't be reached: not a directory"

    @pytest.mark.parametrize("mode", [0o333, 0o555, 0o666])
    def test_a_drop_folder_must_be_readable_writable_and_searchable(
        self, place: Path, mode: int, as_a_plain_user: None
    ) -> None:
        mine = place / "mine"
        mine.mkdir()
        mine.chmod(mode)
        problem = only(a_config(place, DropConfig(path=mine)))
        assert problem.message == f"{mine} can't be read, written and searched"
        assert (
            problem.hint == f"permit the daemon's user (uid {os.geteuid()}) to read, write and search {mine}"
        )

    def test_a_drop_folder_in_an_unreadable_folder_can_not_be_reached(
        self, place: Path, as_a_plain_user: None
    ) -> None:
        (place / "closed/drop").mkdir(parents=True)
        (place / "closed").chmod(0o600)
        config = a_config(place, DropConfig(path=place / "closed/drop"))
        assert an_error(config).endswith("closed/drop can't be reached: permission denied")

    def test_a_sent_dir_that_is_a_file_is_an_error(self, place: Path) -> None:
        (place / "drop/sent").touch()
        assert an_error(a_config(place)) == f"drop.d.sent_dir: {place}/drop/sent is not a folder"

    def test_sent_dir_is_not_checked_if_nothing_is_moved_there(self, place: Path) -> None:
        (place / "drop/sent").touch()
        config = a_config(place, DropConfig(path=place / "drop", on_delivered="keep"))
        assert file_problems(config, NOW) == []

    def test_rejected_dir_is_always_checked(self, place: Path, as_a_plain_user: None) -> None:
        (place / "drop/a/b").mkdir(parents=True)
        (place / "drop/a/b").chmod(0o500)
        config = a_config(place, DropConfig(path=place / "drop", on_delivered="keep", rejected_dir="a/b/c"))
        assert (
            an_error(config) == f"drop.d.rejected_dir: {place}/drop/a/b can't be read, written and searched"
        )

    def test_a_link_below_a_drop_folder_is_an_error(self, place: Path) -> None:
        (place / "drop/sent").symlink_to(place)
        assert an_error(a_config(place)) == (
            f"drop.d.sent_dir: {place}/drop/sent is a symbolic link, which is never followed"
        )

    def test_a_sent_dir_on_another_filesystem_is_an_error(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = place / "drop/sent"
        sent.mkdir()
        table = place / "mountinfo"
        table.write_text(f"36 35 98:0 / {sent} rw - ext4 /dev/sda rw\n", encoding="utf-8")
        monkeypatch.setattr("backupd.config.files._MOUNTINFO", table)
        config = a_config(place)
        assert an_error(config) == f"drop.d.sent_dir: {sent} is on another filesystem than {place}/drop"
        assert "renaming" in only(config).hint

    def test_a_mount_below_a_drop_folder_is_a_warning(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = place / "mountinfo"
        table.write_text(f"1 0 8:1 / {place}/drop/site rw - ext4 /dev/sda1 rw\n")
        monkeypatch.setattr("backupd.config.files._MOUNTINFO", table)

        assert a_warning(a_config(place)) == (
            f"drop.d.path: {place}/drop has a mount below it, {place}/drop/site: its files can't be moved out"
            " of it"
        )
        kept = DropConfig(path=place / "drop", on_delivered="keep")
        assert file_problems(a_config(place, kept), NOW) == []

    def test_a_sticky_folder_of_another_user_is_a_warning(self, place: Path, as_a_plain_user: None) -> None:
        if not IS_ROOT:
            pytest.skip("only root can make a folder of another user")
        with as_root():
            (place / "drop/spool").mkdir()
            (place / "drop/spool").chmod(0o1777)

        assert a_warning(a_config(place)) == (
            f"drop.d.path: {place}/drop/spool is sticky: files of other users can't be moved out of it"
        )
        assert only(a_config(place)).hint == f"chmod -t {place}/drop/spool"

    @pytest.mark.parametrize("own", ["sent", "rejected", ".hidden"])
    def test_a_folder_without_write_permission_is_a_warning(
        self, place: Path, own: str, as_a_plain_user: None
    ) -> None:
        (place / "drop/site/a").mkdir(parents=True)
        (place / "drop/site/a").chmod(0o555)
        (place / "drop" / own / "a").mkdir(parents=True)
        (place / "drop" / own / "a").chmod(0o555)

        assert a_warning(a_config(place)) == (
            f"drop.d.path: {place}/drop/site/a can't be written by the daemon's user: files in it can't be"
            " moved out of it"
        )
        flat = DropConfig(path=place / "drop", recursive=False)
        assert file_problems(a_config(place, flat), NOW) == []

    def test_escapes_in_mount_points_are_decoded(self, place: Path) -> None:
        table = place / "mountinfo"
        table.write_bytes(
            b"22 28 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n"
            b"36 35 98:0 /mnt1 /srv/a\\040b\\134\xc3\xbc rw - ext3 /dev/root rw\n"
        )
        assert {e.mount_point for e in mount_entries(table)} == {b"/proc", "/srv/a b\\ü".encode()}
        assert b"/proc" in {e.mount_point for e in mount_entries(Path("/proc/self/mountinfo"))}
        assert mount_entries(place / "none") == []

    @pytest.mark.root
    @pytest.mark.parametrize(("source", "is_error"), [("drop", True), ("drop/below", True), ("other", False)])
    def test_drops_that_overlap_by_a_bind_mount_are_an_error(
        self, place: Path, source: str, is_error: bool
    ) -> None:
        bound = place / "bound"
        for folder in (bound, place / "drop" / "below", place / "other"):
            folder.mkdir(exist_ok=True)
        if subprocess.run(["mount", "--bind", str(place / source), str(bound)], check=False).returncode:
            pytest.skip("nothing can be mounted here")
        try:
            drops = {"a": DropConfig(path=place / "drop"), "b": DropConfig(path=bound)}
            config = a_config(place).model_copy(update={"drop": drops})
            expected = f"drop.b.path: {bound} overlaps drop.a.path {place}/drop by a bind mount"
            found = [f"{p.where}: {p.message}" for p in file_problems(config, NOW)]
            assert (expected in found) == is_error
        finally:
            subprocess.run(["umount", str(bound)], check=True)

    def test_drops_that_overlap_through_a_link_are_an_error(self, place: Path) -> None:
        (place / "link").symlink_to(place / "drop")
        config = a_config(place).model_copy(
            update={
                "drop": {"a": DropConfig(path=place / "drop"), "b": DropConfig(path=place / "link")},
            }
        )
        assert an_error(config) == (f"drop.b.path: {place}/link overlaps drop.a.path {place}/drop")

    @pytest.mark.parametrize("state", ["drop", "drop/state", "."])
    def test_state_dir_and_a_drop_folder_must_not_overlap(self, place: Path, state: str) -> None:
        config = a_config(place).model_copy(update={"state_dir": place / state})
        assert an_error(config) == f"drop.d.path: {place}/drop overlaps state_dir {place / state}"

    def test_a_missing_state_dir_that_can_be_created_is_no_problem(
        self, place: Path, as_a_plain_user: None
    ) -> None:
        config = a_config(place).model_copy(update={"state_dir": place / "a/b/c"})
        assert file_problems(config, NOW) == []

    def test_a_state_dir_that_can_not_be_created_is_an_error(
        self, place: Path, as_a_plain_user: None
    ) -> None:
        (place / "closed").mkdir(mode=0o555)
        config = a_config(place).model_copy(update={"state_dir": place / "closed/state"})
        assert an_error(config) == f"state_dir: {place}/closed/state can't be created"

    def test_a_state_dir_that_can_not_be_written_is_an_error(
        self, place: Path, as_a_plain_user: None
    ) -> None:
        (place / "state").mkdir(mode=0o555)
        assert an_error(a_config(place)) == f"state_dir: {place}/state can't be written to"

    def test_a_state_dir_that_is_a_file_is_an_error(self, place: Path) -> None:
        (place / "state").touch()
        assert an_error(a_config(place)) == f"state_dir: {place}/state is not a folder"


class Tls:
    """Certificates and keys as files, with the properties that a test needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.cert_file = self.certificate("client.pem")
        self.key_file = self.private_key("client.key")

    def write(self, name: str, content: bytes, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def certificate(
        self,
        name: str,
        *,
        begin: timedelta = timedelta(days=-1),
        end: timedelta = timedelta(days=365),
        purpose: x509.ObjectIdentifier | None = None,
    ) -> Path:
        return self.write(name, self.certificate_bytes(name, begin=begin, end=end, purpose=purpose))

    def certificate_bytes(
        self,
        name: str,
        *,
        begin: timedelta = timedelta(days=-1),
        end: timedelta = timedelta(days=365),
        purpose: x509.ObjectIdentifier | None = None,
        encoding: serialization.Encoding = serialization.Encoding.PEM,
    ) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + begin)
            .not_valid_after(NOW + end)
        )
        if purpose:
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(encoding)

    def private_key(
        self,
        name: str,
        key: EllipticCurvePrivateKey | None = None,
        *,
        password: bytes | None = None,
        mode: int = 0o600,
        form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    ) -> Path:
        lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        content = (key or self.key).private_bytes(serialization.Encoding.PEM, form, lock)
        return self.write(name, content, mode)

    def config(
        self,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        password: Path | None = None,
    ) -> Config:
        return a_config(
            self.folder,
            destination=HttpDestinationConfig(
                url="https://vault.example.net/",
                ca=ca,
                cert=cert or self.cert_file,
                key=key or self.key_file,
                key_password_file=password,
            ),
        )


@pytest.fixture
def tls(place: Path) -> Tls:
    return Tls(place)


class TestCertificates:
    def test_a_valid_pair_is_no_problem(self, tls: Tls) -> None:
        assert file_problems(tls.config(ca=tls.cert_file), NOW) == []

    def test_a_pair_with_a_chain_is_no_problem(self, tls: Tls) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("client.example.net")
        chain = b"".join(each.bytes() for each in issued.cert_chain_pems)
        config = tls.config(
            ca=tls.write("ca.pem", authority.cert_pem.bytes()),
            cert=tls.write("issued.pem", chain),
            key=tls.write("issued.key", issued.private_key_pem.bytes()),
        )
        assert file_problems(config, datetime.now(UTC)) == []

    def test_an_expired_certificate_is_an_error(self, tls: Tls) -> None:
        cert = tls.certificate("old", end=timedelta(hours=-1))
        assert an_error(tls.config(cert=cert)) == (
            f"destination.v.cert: {cert} contains CN=old, which expired on "
            f"{local_time(NOW - timedelta(hours=1))}"
        )

    def test_a_certificate_that_is_not_yet_valid_is_an_error(self, tls: Tls) -> None:
        cert = tls.certificate("new", begin=timedelta(days=1))
        begins = local_time(NOW + timedelta(days=1))
        assert f"contains CN=new, which is not valid before {begins}" in an_error(tls.config(cert=cert))

    def test_a_certificate_that_expires_soon_is_a_warning(self, tls: Tls) -> None:
        cert = tls.certificate("soon", begin=timedelta(days=-90), end=timedelta(days=14, seconds=-1))
        config = tls.config(cert=cert)
        assert "which expires on 2030-06-15, in 13 days" in a_warning(config)
        assert file_problems(config, NOW - timedelta(seconds=1)) == []

    def test_the_limits_of_an_expiring_certificate_can_be_set(self, tls: Tls) -> None:
        cert = tls.certificate("soon", begin=timedelta(days=-90), end=timedelta(days=20))
        assert file_problems(tls.config(cert=cert), NOW) == []
        config = tls.config(cert=cert).model_copy(update={"certificate_warning": timedelta(days=21)})
        assert "which expires on 2030-06-21, in 20 days" in a_warning(config)

    def test_a_certificate_that_lives_a_day_is_judged_by_its_lifetime(self, tls: Tls) -> None:
        cert = tls.certificate("daily", begin=timedelta(hours=-16), end=timedelta(hours=8))
        config = tls.config(cert=cert)
        assert file_problems(config, NOW) == []
        (found,) = file_problems(config, NOW + timedelta(hours=3))
        assert not found.fatal
        assert f"which expires at {local_time(NOW + timedelta(hours=8))}, in 5 h" in found.message

    def test_an_expired_certificate_in_the_chain_is_a_warning(self, tls: Tls) -> None:
        """As that of a root which an expired one has signed, and which servers trust by itself."""
        old = tls.certificate_bytes("middle", end=timedelta(hours=-1))
        cert = tls.write("chain.pem", tls.cert_file.read_bytes() + old)
        assert "contains CN=middle, which expired on" in a_warning(tls.config(cert=cert))
        assert examine_files(tls.config(cert=cert), NOW).certificates["v"][1].ends == NOW + timedelta(
            days=365
        )

    def test_a_client_certificate_below_that_of_its_issuer_is_an_error(self, tls: Tls) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("client.example.net")
        order = authority.cert_pem.bytes() + issued.cert_chain_pems[0].bytes()
        config = tls.config(
            cert=tls.write("order.pem", order), key=tls.write("issued.key", issued.private_key_pem.bytes())
        )
        (problem,) = file_problems(config, datetime.now(UTC))
        assert "is the key of certificate 2 in" in problem.message
        assert "put the certificate of this key first" in problem.hint

    @pytest.mark.parametrize("label", [b"X509 CERTIFICATE", b"TRUSTED CERTIFICATE"])
    def test_the_older_labels_of_certificates_are_read(self, tls: Tls, label: bytes) -> None:
        path, end = tls.folder / "labelled.pem", NOW + timedelta(days=365)
        if label == b"TRUSTED CERTIFICATE":
            require("openssl")
            trust = ["-trustout", "-setalias", "vault", "-addtrust", "clientAuth"]
            subprocess.run(["openssl", "x509", "-in", tls.cert_file, *trust, "-out", path], check=True)
        else:
            path.write_bytes(tls.cert_file.read_bytes().replace(b"CERTIFICATE", label))
        assert label in path.read_bytes()
        config = tls.config(cert=path, ca=path)
        assert file_problems(config, NOW) == []
        assert examine_files(config, NOW).certificates["v"][1].ends == end
        files = config.destination["v"].tls_files
        assert files is not None
        make_context(files)

    @pytest.mark.parametrize(
        ("key", "command"),
        [("cert", "openssl pkcs12 -in {} -nokeys -out {}.cert.pem"), ("key", "-nocerts -nodes -out")],
    )
    def test_a_file_in_pkcs12_has_a_hint_that_converts_it(self, tls: Tls, key: str, command: str) -> None:
        encryption = serialization.BestAvailableEncryption(b"secret")
        certificate = x509.load_pem_x509_certificate(tls.cert_file.read_bytes())
        path = tls.write(
            "c.p12", serialize_key_and_certificates(b"c", tls.key, certificate, None, encryption)
        )
        (problem,) = file_problems(tls.config(**{key: path}), NOW)
        assert command.format(path, path) in problem.hint
        if key == "cert":
            command = f"{problem.hint.partition(': ')[2]} -passin pass:secret"
            subprocess.run(shlex.split(command), check=True)
            assert file_problems(tls.config(cert=Path(f"{path}.cert.pem")), NOW) == []

    def test_a_certificate_for_servers_only_is_a_warning(self, tls: Tls) -> None:
        cert = tls.certificate("server", purpose=ExtendedKeyUsageOID.SERVER_AUTH)
        assert "is not a client certificate: its extended key usage lacks clientAuth" in a_warning(
            tls.config(cert=cert)
        )
        cert = tls.certificate("client", purpose=ExtendedKeyUsageOID.CLIENT_AUTH)
        assert file_problems(tls.config(cert=cert), NOW) == []

    def test_a_missing_certificate_is_an_error(self, tls: Tls) -> None:
        config = tls.config(cert=tls.folder / "none.pem")
        assert an_error(config) == f"destination.v.cert: {tls.folder}/none.pem does not exist"

    def test_a_folder_is_not_a_certificate(self, tls: Tls) -> None:
        assert an_error(tls.config(cert=tls.folder)).endswith("can't be read: is a directory")

    @pytest.mark.parametrize("key", ["ca", "cert", "key", "password"])
    def test_only_a_regular_file_is_read(self, tls: Tls, key: str) -> None:
        fifo, link = tls.folder / "fifo", tls.folder / "link"
        os.mkfifo(fifo)
        link.symlink_to(fifo)
        more = {"key": tls.private_key("locked.key", password=b"secret")} if key == "password" else {}
        config = tls.config(**{**more, key: link})
        assert [p.message for p in file_problems(config, NOW) if p.fatal] == [f"{link} is not a regular file"]
        files = config.destination["v"].tls_files
        assert files is not None
        with pytest.raises(TlsFilesError, match="is not a regular file"):
            make_context(files)

    def test_a_certificate_with_unreadable_dates_is_a_warning(self, tls: Tls) -> None:
        builder = x509.CertificateBuilder(x509.Name([]), x509.Name([]), tls.key.public_key(), 1, NOW, NOW)
        certificate = with_private_extensions(builder).sign(tls.key, hashes.SHA256())
        odd = tls.write("odd.pem", altered(certificate, tls.key, "times without seconds"))
        config = tls.config(cert=odd)
        assert "of which the dates can't be read" in a_warning(config)
        assert examine_files(config, NOW).certificates == {}
        chain = tls.write("chain.pem", tls.cert_file.read_bytes() + odd.read_bytes())
        assert "of which the dates can't be read" in a_warning(tls.config(cert=chain))
        assert "v" in examine_files(tls.config(cert=chain), NOW).certificates

    def test_a_serial_number_of_0_is_not_reported_on_the_terminal(self, tls: Tls) -> None:
        builder = x509.CertificateBuilder(
            x509.Name([]), x509.Name([]), tls.key.public_key(), 1, NOW, NOW + timedelta(days=9)
        )
        certificate = with_private_extensions(builder).sign(tls.key, hashes.SHA256())
        odd = tls.write("odd.pem", altered(certificate, tls.key, "serial number 0"))
        program = (
            "import pathlib, sys; from backupd.config.tls_loading import certificates\n"
            "print(certificates(pathlib.Path(sys.argv[1]).read_bytes())[0].validity is not None)"
        )
        command = [sys.executable, "-W", "default", "-c", program, str(odd)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("True\n", "")

    @pytest.mark.parametrize(
        ("content", "text", "hint"),
        [
            (bytes.fromhex("308006092a864886f70d010702"), "", "openssl pkcs7 -inform der -print_certs"),
            (b"-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n", "a certificate request", "has issued for it"),
            (b"\xfe\xed\xfe\xed\0\0\0\x02", "is a Java key store", "keytool -importkeystore"),
        ],
    )
    def test_another_format_has_its_own_words(self, tls: Tls, content: bytes, text: str, hint: str) -> None:
        problem = only(tls.config(cert=tls.write("other", content)))
        assert text in problem.message
        assert hint in problem.hint

    def test_a_key_of_openssh_has_a_hint_that_converts_it(self, tls: Tls) -> None:
        form = serialization.PrivateFormat.OpenSSH
        key = tls.private_key("ssh.key", form=form)
        problem = only(tls.config(key=key))
        assert "is in the format of OpenSSH" in problem.message
        assert "ssh-keygen -p -m PKCS8" in problem.hint

    @pytest.mark.parametrize("algorithm", ["PBE-SHA1-RC2-40", "AES-256-CBC"])
    def test_the_command_that_converts_pkcs12_knows_old_algorithms(self, tls: Tls, algorithm: str) -> None:
        path = tls.folder / "c.p12"
        pair = ["-inkey", str(tls.key_file), "-in", str(tls.cert_file), "-out", str(path)]
        old = ["-legacy"] if "RC2" in algorithm else []
        export = ["pkcs12", "-export", "-certpbe", algorithm, *old, *pair, "-passout", "pass:secret"]
        subprocess.run([require("openssl"), *export], check=True, capture_output=True)
        path.chmod(0o600)
        command = only(tls.config(cert=path)).hint.partition(": ")[2]
        subprocess.run(shlex.split(f"{command} -passin pass:secret"), check=True)
        assert file_problems(tls.config(cert=Path(f"{path}.cert.pem")), NOW) == []

    def test_a_revocation_list_is_not_an_authority(self, tls: Tls) -> None:
        builder = x509.CertificateRevocationListBuilder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]), NOW, NOW + timedelta(days=9)
        )
        pem = builder.sign(tls.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        assert an_error(tls.config(ca=tls.write("crl.pem", pem))).endswith("contains no certificate in PEM")

    def test_an_unreadable_certificate_is_an_error(self, tls: Tls, as_a_plain_user: None) -> None:
        (tls.folder / "closed").mkdir(mode=0o000)
        config = a_config(
            tls.folder,
            destination=HttpDestinationConfig(url="https://vault/", ca=tls.folder / "closed/ca.pem"),
        )
        assert an_error(config) == f"destination.v.ca: {tls.folder}/closed/ca.pem is not readable"

    def test_a_certificate_in_der_has_a_hint_that_converts_it(self, tls: Tls) -> None:
        der = tls.write("cert.der", tls.certificate_bytes("der", encoding=serialization.Encoding.DER))
        config = tls.config(cert=der)
        assert an_error(config).endswith("contains no certificate in PEM")
        assert "openssl x509 -inform der" in only(config).hint

    def test_a_damaged_certificate_is_an_error(self, tls: Tls) -> None:
        content = tls.cert_file.read_bytes()
        config = tls.config(cert=tls.write("cut.pem", content[: len(content) // 2]))
        assert an_error(config).endswith("contains a damaged certificate")

    def test_a_cut_certificate_below_a_whole_one_is_an_error(self, tls: Tls) -> None:
        content = tls.cert_file.read_bytes()
        path = tls.write("bundle.pem", content + content[: len(content) // 2])
        assert an_error(tls.config(ca=path)).endswith("contains a damaged certificate")

    def test_a_key_is_not_an_authority(self, tls: Tls) -> None:
        assert an_error(tls.config(ca=tls.key_file)) == (
            f"destination.v.ca: {tls.key_file} contains no certificate in PEM"
        )

    def test_an_expired_authority_beside_a_valid_one_is_only_a_warning(self, tls: Tls) -> None:
        old = tls.certificate_bytes("old", end=timedelta(hours=-1))
        assert "contains CN=old, which expired on" in an_error(tls.config(ca=tls.write("old.pem", old)))
        both = tls.write("both.pem", old + tls.cert_file.read_bytes())
        assert "contains CN=old, which expired on" in a_warning(tls.config(ca=both))

    def test_the_earliest_expiry_is_that_of_the_first_certificate_to_expire(self, tls: Tls) -> None:
        middle = tls.certificate_bytes("middle", end=timedelta(days=90))
        chain = tls.write("chain.pem", tls.cert_file.read_bytes() + middle)
        destination = HttpDestinationConfig(url="https://vault/", cert=chain, key=tls.key_file)
        validity = client_validity(destination, CertificateLimits(), NOW)
        assert validity
        assert validity.ends == NOW + timedelta(days=90)
        assert examine_files(tls.config(cert=chain), NOW).certificates == {"v": (chain, validity)}

    def test_the_files_of_the_token_endpoint_are_examined_as_well(self, tls: Tls) -> None:
        soon = tls.certificate("soon", begin=timedelta(days=-90), end=timedelta(days=5))
        auth = {
            "type": "oauth2",
            "token_url": "https://login.example.net/token",
            "client_id": "backupd",
            "client_secret_file": tls.write("secret", b"secret"),
            "ca": tls.folder / "none.pem",
            "cert": soon,
            "key": tls.key_file,
        }
        config = tls.config()
        vault = HttpDestinationConfig.model_validate(
            {"url": "https://vault/", "cert": tls.cert_file, "key": tls.key_file, "auth": auth}
        )
        config = config.model_copy(update={"destination": {"v": vault}})
        report = examine_files(config, NOW)
        assert [(problem.where, problem.fatal) for problem in report.problems] == [
            ("destination.v.auth.ca", True),
            ("destination.v.auth.cert", False),
        ]
        assert report.fatal == ()
        assert report.unusable("v")[0].where == "destination.v.auth.ca"
        assert report.certificates["v"][1].ends == NOW + timedelta(days=5)

    def test_an_unreadable_certificate_has_no_expiry(self, tls: Tls) -> None:
        assert examine_files(tls.config(cert=tls.folder / "none.pem"), NOW).certificates == {}


class TestKeys:
    def test_a_key_of_another_certificate_is_an_error(self, tls: Tls) -> None:
        key = tls.private_key("other.key", ec.generate_private_key(ec.SECP256R1()))
        assert an_error(tls.config(key=key)) == (
            f"destination.v.key: {key} is not the key of the certificate in {tls.cert_file}"
        )

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
    def test_a_key_that_others_may_read_is_a_warning(self, tls: Tls, mode: int) -> None:
        tls.key_file.chmod(mode)
        assert f"is accessible to group or others (mode {mode:04o})" in a_warning(tls.config())
        assert only(tls.config()).hint == f"chmod 0600 {tls.key_file}"

    def test_the_mode_of_a_systemd_credential_is_not_checked(
        self, tls: Tls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tls.key_file.chmod(0o440)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tls.folder))
        assert file_problems(tls.config(), NOW) == []

    def test_a_file_without_a_key_is_an_error(self, tls: Tls) -> None:
        assert "does not exist" in an_error(tls.config(key=tls.folder / "none.key"))
        assert an_error(tls.config(key=tls.cert_file)).endswith("contains no private key in PEM")

    @pytest.mark.parametrize(
        "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
    )
    def test_an_encrypted_key_needs_the_right_password(
        self, tls: Tls, form: serialization.PrivateFormat
    ) -> None:
        key = tls.private_key("locked.key", password="pä ss".encode(), form=form)
        right, wrong = tls.write("right", "pä ss\n".encode()), tls.write("wrong", b"guess")
        assert file_problems(tls.config(key=key, password=right), NOW) == []
        assert an_error(tls.config(key=key, password=wrong)) == (
            f"destination.v.key_password_file: {wrong} does not have the password of {key}"
        )
        assert an_error(tls.config(key=key)) == f"destination.v.key: {key} is encrypted"
        assert "key_password_file" in only(tls.config(key=key)).hint

    def test_a_password_file_must_exist_and_not_be_empty(self, tls: Tls) -> None:
        key = tls.private_key("locked.key", password=b"secret")
        missing = tls.folder / "none"
        assert an_error(tls.config(key=key, password=missing)) == (
            f"destination.v.key_password_file: {missing} does not exist"
        )
        empty = tls.write("empty", b"\n")
        assert an_error(tls.config(key=key, password=empty)) == (
            f"destination.v.key_password_file: {empty} is empty"
        )

    @pytest.mark.parametrize("content", [b"secret", b"x" * 2000, b""])
    def test_a_password_for_an_unencrypted_key_is_a_warning(self, tls: Tls, content: bytes) -> None:
        password = tls.write("password", content)
        config = tls.config(password=password)
        assert a_warning(config) == (
            f"destination.v.key_password_file: {password} is not needed: {tls.key_file} is not encrypted"
        )
        files = config.destination["v"].tls_files
        assert files is not None
        make_context(files)

    def test_a_password_that_openssl_does_not_take_is_an_error_of_its_file(self, tls: Tls) -> None:
        key = tls.private_key("locked.key", password=b"secret")
        password = tls.write("long", b"x" * 1025 + b"\n")
        config = tls.config(key=key, password=password)
        assert an_error(config) == (
            f"destination.v.key_password_file: {password} has 1025 bytes, and the password of a key has at"
            " most 1024"
        )
        files = config.destination["v"].tls_files
        assert files is not None
        with pytest.raises(TlsFilesError, match="has 1025 bytes"):
            make_context(files)

    def test_a_key_of_another_kind_is_not_that_of_the_certificate(self, tls: Tls) -> None:
        key = rsa.generate_private_key(65537, 2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        assert "is not the key of the certificate in" in an_error(tls.config(key=tls.write("rsa.key", pem)))

    def test_a_password_file_that_others_may_read_is_a_warning(self, tls: Tls) -> None:
        key = tls.private_key("locked.key", password=b"secret")
        password = tls.write("password", b"secret", mode=0o644)
        assert "destination.v.key_password_file" in a_warning(tls.config(key=key, password=password))


def test_all_problems_are_reported_at_once(tls: Tls) -> None:
    key = tls.private_key("other.key", ec.generate_private_key(ec.SECP256R1()), mode=0o644)
    cert = tls.certificate("old", end=timedelta(days=-1))
    config = tls.config(ca=tls.folder / "ca.pem", cert=cert, key=key).model_copy(
        update={"drop": {"d": DropConfig(path=tls.folder / "none")}, "state_dir": tls.cert_file}
    )
    assert [(problem.where, problem.fatal) for problem in file_problems(config, NOW)] == [
        ("state_dir", True),
        ("drop.d.path", True),
        ("destination.v.ca", True),
        ("destination.v.cert", True),
        ("destination.v.key", False),
        ("destination.v.key", True),
    ]


class TestMetrics:
    def with_metrics(self, place: Path, **keys: object) -> Config:
        return a_config(place).model_copy(update={"metrics": MetricsConfig.model_validate(keys)})

    def test_a_certificate_of_the_server_is_checked_and_prevents_no_start(self, tls: Tls) -> None:
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH
        cert = tls.certificate("metrics", end=timedelta(days=-1), purpose=purpose)
        config = self.with_metrics(tls.folder, listen="127.0.0.1:9184", cert=str(cert), key=str(tls.key_file))
        found = file_problems(config, NOW)

        assert [problem.where for problem in found] == ["metrics.cert", "metrics.cert"]
        assert "which expired on" in found[0].message
        assert "is not a server certificate: its extended key usage lacks serverAuth" in found[1].message
        assert not any(problem.prevents_start for problem in found)

    def test_a_server_for_other_hosts_without_client_certificates_is_a_warning(self, tls: Tls) -> None:
        keys = {"listen": "0.0.0.0:9184", "cert": str(tls.cert_file), "key": str(tls.key_file)}

        config = self.with_metrics(tls.folder, **keys)

        assert "every host that can connect to 0.0.0.0:9184 can read" in a_warning(config)

    def test_the_folder_of_the_textfile_must_exist(self, place: Path) -> None:
        config = self.with_metrics(place, textfile=str(place / "missing" / "backupd.prom"))
        problem = only(config)

        assert problem.message == f"{place}/missing is not a folder"
        assert not problem.prevents_start

    def test_the_folder_of_the_textfile_must_be_writable(self, place: Path, as_a_plain_user: None) -> None:
        folder = place / "node_exporter"
        folder.mkdir(mode=0o555)
        config = self.with_metrics(place, textfile=str(folder / "backupd.prom"))

        assert "can't be written to" in an_error(config)
        assert f"ReadWritePaths={folder}" in only(config).hint
