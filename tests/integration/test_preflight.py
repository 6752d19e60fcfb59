import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backupd.config.files import file_problems, mount_points
from backupd.config.models import Config, DestinationConfig, DropConfig
from backupd.config.problems import FileProblem

NOW = datetime(2030, 6, 1, 12, tzinfo=UTC)
NOBODY = 65534


@pytest.fixture(autouse=True)
def _no_credentials_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


@pytest.fixture
def place() -> Iterator[Path]:
    """Lend a folder that everyone can reach, unlike those of pytest."""
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
    """Give up root's power to ignore permissions for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def a_config(
    place: Path, drop: DropConfig | None = None, destination: DestinationConfig | None = None
) -> Config:
    return Config(
        state_dir=place / "state",
        drop={"d": drop or DropConfig(path=place / "drop")},
        destination={"v": destination or DestinationConfig(url="https://vault.example.net/")},
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


class TestFolders:
    def test_good_ones_raise_no_problem(self, place: Path) -> None:
        (place / "drop/sent").mkdir()
        (place / "state").mkdir()
        assert file_problems(a_config(place), NOW) == []

    def test_a_missing_drop_is_told_with_a_way_out(self, place: Path) -> None:
        config = a_config(place, DropConfig(path=place / "none"))
        assert an_error(config) == f"drop.d.path: {place}/none does not exist"
        assert str(only(config)).endswith(f"hint: mkdir -p {place}/none, or name another")

    def test_a_file_is_no_drop(self, place: Path) -> None:
        (place / "file").touch()
        config = a_config(place, DropConfig(path=place / "file"))
        assert an_error(config) == f"drop.d.path: {place}/file is not a folder"

    def test_a_path_through_a_file_is_no_drop(self, place: Path) -> None:
        (place / "file").touch()
        config = a_config(place, DropConfig(path=place / "file/drop"))
        assert an_error(config) == f"drop.d.path: {place}/file/drop can't be reached: not a directory"

    @pytest.mark.parametrize("mode", [0o333, 0o555, 0o666])
    def test_a_drop_must_be_readable_writable_and_searchable(
        self, place: Path, mode: int, as_a_plain_user: None
    ) -> None:
        mine = place / "mine"
        mine.mkdir()
        mine.chmod(mode)
        problem = only(a_config(place, DropConfig(path=mine)))
        assert problem.message == f"{mine} can't be read, written and searched"
        assert problem.hint == f"let the daemon's user (uid {os.geteuid()}) read, write and search {mine}"

    def test_a_drop_in_a_closed_folder_can_not_be_reached(self, place: Path, as_a_plain_user: None) -> None:
        (place / "closed/drop").mkdir(parents=True)
        (place / "closed").chmod(0o600)
        config = a_config(place, DropConfig(path=place / "closed/drop"))
        assert an_error(config).endswith("closed/drop can't be reached: permission denied")

    def test_a_sent_folder_that_is_a_file_is_told(self, place: Path) -> None:
        (place / "drop/sent").touch()
        assert an_error(a_config(place)) == f"drop.d.sent_dir: {place}/drop/sent is not a folder"

    def test_a_sent_folder_is_not_needed_where_nothing_is_moved_there(self, place: Path) -> None:
        (place / "drop/sent").touch()
        config = a_config(place, DropConfig(path=place / "drop", on_delivered="keep"))
        assert file_problems(config, NOW) == []

    def test_the_quarantine_is_always_needed(self, place: Path, as_a_plain_user: None) -> None:
        (place / "drop/a/b").mkdir(parents=True)
        (place / "drop/a/b").chmod(0o500)
        config = a_config(place, DropConfig(path=place / "drop", on_delivered="keep", rejected_dir="a/b/c"))
        assert (
            an_error(config) == f"drop.d.rejected_dir: {place}/drop/a/b can't be read, written and searched"
        )

    def test_a_link_is_never_followed_below_a_drop(self, place: Path) -> None:
        (place / "drop/sent").symlink_to(place)
        assert an_error(a_config(place)) == (
            f"drop.d.sent_dir: {place}/drop/sent is a symbolic link, which is never followed"
        )

    def test_a_sent_folder_on_another_filesystem_is_told(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = place / "drop/sent"
        sent.mkdir()
        table = place / "mountinfo"
        table.write_text(f"36 35 98:0 / {sent} rw - ext4 /dev/sda rw\n", encoding="utf-8")
        monkeypatch.setattr("backupd.config.files._MOUNTS", table)
        config = a_config(place)
        assert an_error(config) == f"drop.d.sent_dir: {sent} is on another filesystem than {place}/drop"
        assert "renaming" in only(config).hint

    def test_mount_points_are_read_with_their_escapes(self, place: Path) -> None:
        table = place / "mountinfo"
        table.write_bytes(
            b"22 28 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n"
            b"36 35 98:0 /mnt1 /srv/a\\040b\\134\xc3\xbc rw - ext3 /dev/root rw\n"
        )
        assert mount_points(table) == {Path("/proc"), Path("/srv/a b\\ü")}
        assert Path("/proc") in mount_points(Path("/proc/self/mountinfo"))
        assert mount_points(place / "none") == set()

    def test_drops_that_a_link_brings_together_are_told(self, place: Path) -> None:
        (place / "link").symlink_to(place / "drop")
        config = a_config(place).model_copy(
            update={
                "drop": {"a": DropConfig(path=place / "drop"), "b": DropConfig(path=place / "link")},
            }
        )
        assert an_error(config) == (
            f"drop.b.path: {place}/link and drop.a.path {place}/drop lie within one another"
        )

    @pytest.mark.parametrize("state", ["drop", "drop/state", "."])
    def test_state_and_drop_must_be_apart(self, place: Path, state: str) -> None:
        config = a_config(place).model_copy(update={"state_dir": place / state})
        assert "lie within one another" in an_error(config)

    def test_a_state_folder_is_made_where_it_can_be(self, place: Path, as_a_plain_user: None) -> None:
        config = a_config(place).model_copy(update={"state_dir": place / "a/b/c"})
        assert file_problems(config, NOW) == []

    def test_a_state_folder_that_can_not_be_made_is_told(self, place: Path, as_a_plain_user: None) -> None:
        (place / "closed").mkdir(mode=0o555)
        config = a_config(place).model_copy(update={"state_dir": place / "closed/state"})
        assert an_error(config) == f"state_dir: {place}/closed/state can't be created"

    def test_a_state_folder_that_can_not_be_written_is_told(self, place: Path, as_a_plain_user: None) -> None:
        (place / "state").mkdir(mode=0o555)
        assert an_error(a_config(place)) == f"state_dir: {place}/state can't be written to"

    def test_a_file_in_the_way_of_the_state_folder_is_told(self, place: Path) -> None:
        (place / "state").touch()
        assert an_error(a_config(place)) == f"state_dir: {place}/state is not a folder"


class Tls:
    """Certificates and keys as files, made to measure."""

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
            destination=DestinationConfig(
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
    def test_a_good_pair_raises_no_problem(self, tls: Tls) -> None:
        assert file_problems(tls.config(ca=tls.cert_file), NOW) == []

    def test_a_pair_as_authorities_issue_it_raises_no_problem(self, tls: Tls) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("client.example.net")
        chain = b"".join(each.bytes() for each in issued.cert_chain_pems)
        config = tls.config(
            ca=tls.write("ca.pem", authority.cert_pem.bytes()),
            cert=tls.write("issued.pem", chain),
            key=tls.write("issued.key", issued.private_key_pem.bytes()),
        )
        assert file_problems(config, datetime.now(UTC)) == []

    def test_an_expired_one_is_fatal(self, tls: Tls) -> None:
        cert = tls.certificate("old", end=timedelta(hours=-1))
        assert an_error(tls.config(cert=cert)) == (
            f"destination.v.cert: {cert} holds CN=old, expired since 2030-06-01 11:00 UTC"
        )

    def test_one_that_is_not_yet_valid_is_fatal(self, tls: Tls) -> None:
        cert = tls.certificate("new", begin=timedelta(days=1))
        assert "holds CN=new, not valid before 2030-06-02 12:00 UTC" in an_error(tls.config(cert=cert))

    def test_one_that_expires_soon_is_warned_of(self, tls: Tls) -> None:
        cert = tls.certificate("soon", end=timedelta(days=30))
        config = tls.config(cert=cert)
        assert "which expires on 2030-07-01, in 30 days" in a_warning(config)
        assert file_problems(config, NOW - timedelta(seconds=1)) == []

    def test_an_expired_one_further_up_the_chain_is_fatal(self, tls: Tls) -> None:
        old = tls.certificate_bytes("middle", end=timedelta(hours=-1))
        cert = tls.write("chain.pem", tls.cert_file.read_bytes() + old)
        assert "holds CN=middle, expired since" in an_error(tls.config(cert=cert))

    def test_one_that_is_for_servers_only_is_warned_of(self, tls: Tls) -> None:
        cert = tls.certificate("server", purpose=ExtendedKeyUsageOID.SERVER_AUTH)
        assert "is not meant for clients" in a_warning(tls.config(cert=cert))
        cert = tls.certificate("client", purpose=ExtendedKeyUsageOID.CLIENT_AUTH)
        assert file_problems(tls.config(cert=cert), NOW) == []

    def test_a_missing_one_is_told(self, tls: Tls) -> None:
        config = tls.config(cert=tls.folder / "none.pem")
        assert an_error(config) == f"destination.v.cert: {tls.folder}/none.pem does not exist"

    def test_a_folder_is_no_certificate(self, tls: Tls) -> None:
        assert an_error(tls.config(cert=tls.folder)).endswith("can't be read: is a directory")

    def test_an_unreadable_one_is_told(self, tls: Tls, as_a_plain_user: None) -> None:
        (tls.folder / "closed").mkdir(mode=0o000)
        config = a_config(
            tls.folder,
            destination=DestinationConfig(url="https://vault/", ca=tls.folder / "closed/ca.pem"),
        )
        assert an_error(config) == f"destination.v.ca: {tls.folder}/closed/ca.pem is not readable"

    def test_der_is_told_with_how_to_convert_it(self, tls: Tls) -> None:
        der = tls.write("cert.der", tls.certificate_bytes("der", encoding=serialization.Encoding.DER))
        config = tls.config(cert=der)
        assert an_error(config).endswith("holds no certificate in PEM")
        assert "openssl x509 -inform der" in only(config).hint

    def test_a_damaged_one_is_told(self, tls: Tls) -> None:
        content = tls.cert_file.read_bytes()
        config = tls.config(cert=tls.write("cut.pem", content[: len(content) // 2]))
        assert an_error(config).endswith("holds a damaged certificate")

    def test_a_key_is_no_authority(self, tls: Tls) -> None:
        assert an_error(tls.config(ca=tls.key_file)) == (
            f"destination.v.ca: {tls.key_file} holds no certificate in PEM"
        )

    def test_an_old_authority_beside_a_good_one_is_only_warned_of(self, tls: Tls) -> None:
        old = tls.certificate_bytes("old", end=timedelta(hours=-1))
        assert "holds CN=old, expired since" in an_error(tls.config(ca=tls.write("old.pem", old)))
        both = tls.write("both.pem", old + tls.cert_file.read_bytes())
        assert "holds CN=old, expired since" in a_warning(tls.config(ca=both))


class TestKeys:
    def test_a_key_of_another_certificate_is_fatal(self, tls: Tls) -> None:
        key = tls.private_key("other.key", ec.generate_private_key(ec.SECP256R1()))
        assert an_error(tls.config(key=key)) == (
            f"destination.v.key: {key} is not the key of the certificate in {tls.cert_file}"
        )

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
    def test_a_key_that_others_may_read_is_warned_of(self, tls: Tls, mode: int) -> None:
        tls.key_file.chmod(mode)
        assert f"is open to group or others (mode {mode:04o})" in a_warning(tls.config())
        assert only(tls.config()).hint == f"chmod 0600 {tls.key_file}"

    def test_the_modes_of_systemds_credentials_are_its_own(
        self, tls: Tls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tls.key_file.chmod(0o440)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tls.folder))
        assert file_problems(tls.config(), NOW) == []

    def test_a_file_without_a_key_is_told(self, tls: Tls) -> None:
        assert "does not exist" in an_error(tls.config(key=tls.folder / "none.key"))
        assert an_error(tls.config(key=tls.cert_file)).endswith("holds no private key in PEM")

    @pytest.mark.parametrize(
        "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
    )
    def test_a_key_with_a_password_is_unlocked(self, tls: Tls, form: serialization.PrivateFormat) -> None:
        key = tls.private_key("locked.key", password="pä ss".encode(), form=form)
        right, wrong = tls.write("right", "pä ss\n".encode()), tls.write("wrong", b"guess")
        assert file_problems(tls.config(key=key, password=right), NOW) == []
        assert an_error(tls.config(key=key, password=wrong)) == (
            f"destination.v.key_password_file: {wrong} does not unlock {key}"
        )
        assert an_error(tls.config(key=key)) == f"destination.v.key: {key} is encrypted"
        assert "key_password_file" in only(tls.config(key=key)).hint

    def test_a_password_file_must_be_there_and_hold_something(self, tls: Tls) -> None:
        key = tls.private_key("locked.key", password=b"secret")
        missing = tls.folder / "none"
        assert an_error(tls.config(key=key, password=missing)) == (
            f"destination.v.key_password_file: {missing} does not exist"
        )
        empty = tls.write("empty", b"\n")
        assert an_error(tls.config(key=key, password=empty)) == (
            f"destination.v.key_password_file: {empty} is empty"
        )

    def test_a_password_for_a_key_without_one_is_told(self, tls: Tls) -> None:
        password = tls.write("password", b"secret")
        assert "has no password" in an_error(tls.config(password=password))

    def test_a_password_that_others_may_read_is_warned_of(self, tls: Tls) -> None:
        key = tls.private_key("locked.key", password=b"secret")
        password = tls.write("password", b"secret", mode=0o644)
        assert "destination.v.key_password_file" in a_warning(tls.config(key=key, password=password))


def test_all_problems_are_told_at_once(tls: Tls) -> None:
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
