"""Loading a configuration from a file and the environment."""

import tomllib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from backupd.config.load import DEFAULT_PATH, InvalidConfigError, _Settings, load
from backupd.config.models import Config
from backupd.core.errors import ConfigError
from tests.unit.config_files import SMALLEST, a_file, vault

A_CREDENTIAL = "an absolute path, or the name of a file in $CREDENTIALS_DIRECTORY"

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "BACKUPD_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "backupd.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults_in(write: Write, text: str) -> tuple[str, ...]:
    with pytest.raises(InvalidConfigError) as refusal:
        load(write(text))
    assert refusal.value.exit_code == 78
    return refusal.value.findings


class TestLoading:
    def test_the_smallest_file_is_complete(self, write: Write) -> None:
        config = load(write(SMALLEST))
        drop, destination = config.drop["switches"], vault(config)
        assert config.state_dir == Path("/var/lib/backupd")
        assert (config.shutdown_grace, config.heartbeat_every) == (
            timedelta(seconds=30),
            timedelta(seconds=60),
        )
        assert (config.log.format, config.log.level) == ("auto", "info")
        assert (drop.destinations, drop.exclude, drop.recursive) == (None, (), True)
        assert (drop.stable_for, drop.rescan_every) == (None, timedelta(seconds=60))
        assert (drop.min_size, drop.max_size, drop.on_delivered) == (1, None, "move")
        assert (drop.sent_dir, drop.rejected_dir, drop.label_pattern) == ("sent", "rejected", None)
        assert drop.include == ("*",)
        assert destination.success == {200, 201, 202, 204}
        assert (destination.workers, destination.min_rate, destination.http2) == (2, 1024, False)
        assert destination.timeout.read == timedelta(minutes=10)
        assert (destination.receipt.digest, destination.receipt.prefix) == ("body:/sha256", 0)
        assert (destination.retry.max, destination.retry.give_up_after) == (timedelta(minutes=5), None)

    def test_a_configuration_is_immutable(self, write: Write) -> None:
        config = load(write(SMALLEST))
        with pytest.raises(ValidationError):
            config.state_dir = Path("/elsewhere")

    def test_the_default_path_is_below_etc(self) -> None:
        assert Path("/etc/backupd/backupd.toml") == DEFAULT_PATH

    def test_a_byte_order_mark_and_windows_line_ends_are_accepted(self, tmp_path: Path) -> None:
        path = tmp_path / "backupd.toml"
        path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())
        assert load(path) == Config.model_validate(tomllib.loads(SMALLEST))

    def test_paths_are_normalized(self, write: Write) -> None:
        assert load(write(SMALLEST.replace("/backups", "//x/../backups/."))).drop["switches"].path == Path(
            "/srv/backups/switches"
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\n[drop\n", ":2:6: expected ']' at the end of a table declaration\n  [drop"),
            (b"a = 1\na = 2\n", ":2:6: cannot overwrite a value\n  a = 2"),
            (b'name = "open', ':1:13: unterminated string\n  name = "open'),
            (b"", ""),
            (b"a = \xff\n", ": not UTF-8 at byte 4"),
            (b"a = " + b"[" * 100_000, ": nested too deeply"),
            (b"a = " + b"9" * 5000, ": a number has too many digits"),
        ],
    )
    def test_a_syntax_error_has_its_line_and_column(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        path = tmp_path / "backupd.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as refusal:
            load(path)
        assert message in refusal.value.message
        assert refusal.value.message.startswith(str(path))

    @pytest.mark.parametrize(
        "line",
        [
            'headers = { Authorization = "Bearer geheim" ',
            'X-API-Key = "geheim',
            'url = "https://user:geheim@host',
            'password = "geheim"x',
        ],
    )
    def test_a_syntax_error_shows_no_secret(self, write: Write, line: str) -> None:
        with pytest.raises(ConfigError) as refusal:
            load(write(f"[a]\n{line}\n"))
        assert "***" in str(refusal.value)
        assert "geheim" not in str(refusal.value)

    def test_each_fault_is_a_line_of_one_error(self, write: Write) -> None:
        path = write(a_file('stable_for = "two"\nmin_size = 1.5', "headers = 'geheim'"))
        with pytest.raises(ConfigError) as refusal:
            load(path)
        assert refusal.value.message.splitlines() == [
            f"{path} can't be used:",
            'drop.switches.stable_for: expected a duration such as "2s", got "two"',
            'drop.switches.min_size: expected a size such as "20MB", got 1.5',
            "destination.vault.headers: expected a table",
        ]
        assert refusal.value.exit_code == 78
        assert refusal.value.__cause__ is None

    def test_a_missing_file_has_a_hint_that_creates_it(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such file") as refusal:
            load(tmp_path / "none.toml")
        assert "backupd init" in refusal.value.hint

    def test_a_folder_is_not_a_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is a directory"):
            load(tmp_path)


class TestEnvironment:
    def test_it_overrides_the_file(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BACKUPD_STATE_DIR", "/srv/state")
        monkeypatch.setenv("BACKUPD_SHUTDOWN_GRACE", "5s")
        monkeypatch.setenv("BACKUPD_HEARTBEAT_EVERY", "")
        monkeypatch.setenv("BACKUPD_LOG__LEVEL", "debug")
        config = load(write('state_dir = "/x"\n[log]\nformat = "json"\nlevel = "error"\n' + SMALLEST))
        assert (config.state_dir, config.shutdown_grace) == (Path("/srv/state"), timedelta(seconds=5))
        assert config.heartbeat_every == timedelta(seconds=60)
        assert (config.log.format, config.log.level) == ("json", "debug")

    def test_it_can_set_every_scalar_key_outside_of_named_tables(self) -> None:
        scalars = set(Config.model_fields) - {"drop", "destination", "notify", "on_event", "on_events"}
        assert set(_Settings.model_fields) == scalars

    def test_its_faults_name_the_variable(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BACKUPD_STATE_DIR", "var")
        monkeypatch.setenv("BACKUPD_LOG__LEVEL", "loud")
        monkeypatch.setenv("BACKUPD_LOG__FROMAT", "json")
        assert sorted(faults_in(write, SMALLEST)) == [
            'BACKUPD_LOG__FROMAT: unknown key; did you mean "format"?',
            'BACKUPD_LOG__LEVEL: expected "debug", "info", "warning" or "error", got "loud"',
            'BACKUPD_STATE_DIR: expected an absolute path, got "var"',
        ]

    def test_a_whole_table_in_one_variable_is_refused(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BACKUPD_LOG", "debug")
        with pytest.raises(ConfigError, match=r"one of BACKUPD_LOG, BACKUPD_.*: expected") as refusal:
            load(write(SMALLEST))
        assert "BACKUPD_LOG__LEVEL" in refusal.value.hint

    def test_it_does_not_hide_a_fault_of_the_same_key_in_the_file(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BACKUPD_LOG__LEVEL", "debug")
        assert faults_in(write, "log = 5\n" + SMALLEST) == ("log: expected a table, got 5",)

    def test_state_dir_is_that_of_systemd_unless_the_file_sets_it(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
        assert load(write(SMALLEST)).state_dir == Path("/var/lib/one")
        assert load(write('state_dir = "/srv/state"\n' + SMALLEST)).state_dir == Path("/srv/state")

    def test_a_bare_file_name_of_a_tls_file_is_a_systemd_credential(
        self, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        for name in ("client.pem", "client.key", "password"):
            (tmp_path / name).touch()
        text = a_file(destination='cert = "client.pem"\nkey = "client.key"\nkey_password_file = "password"')
        destination = vault(load(write(text)))
        assert (destination.cert, destination.key) == (tmp_path / "client.pem", tmp_path / "client.key")
        assert destination.key_password_file == tmp_path / "password"

    def test_a_bare_file_name_of_another_secret_is_a_systemd_credential(
        self, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        for name in ("token", "api.key", "proxy.password"):
            (tmp_path / name).touch()
        text = a_file(
            destination='auth = { type = "bearer", token_file = "token" }\n'
            'header_files = { X-API-Key = "api.key" }\n'
            'proxy = "http://proxy:3128"\nproxy_password_file = "proxy.password"'
        )
        destination = vault(load(write(text)))
        assert destination.auth.token_file == tmp_path / "token"
        assert destination.header_files == {"X-API-Key": tmp_path / "api.key"}
        assert destination.proxy_password_file == tmp_path / "proxy.password"

    @pytest.mark.parametrize("name", ["other.pem", "../ca.pem", ".", ""])
    def test_other_relative_names_are_refused(
        self, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
    ) -> None:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        assert faults_in(write, a_file(destination=f'ca = "{name}"')) == (
            f'destination.vault.ca: expected {A_CREDENTIAL}, got "{name}"',
        )
