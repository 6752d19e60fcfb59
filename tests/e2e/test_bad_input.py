"""Unusable configurations, files and folders: refused at the start, with a message and a hint."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupd.core.errors import BAD_CONFIG
from backupd.core.names import printable
from backupd.receiver.serve import RunningReceiver
from tests.lines import check_line
from tests.pki import Pki, in_days
from tests.stage import TIMEOUT, Stage

IS_ROOT = os.geteuid() == 0
UNREACHABLE_URL = "https://127.0.0.1:9/upload"
Done = subprocess.CompletedProcess[str]

_OVERRIDES = "-dac_override,-dac_read_search"
_WITHOUT_OVERRIDES = (
    ["setpriv", f"--bounding-set={_OVERRIDES}", f"--inh-caps={_OVERRIDES}", "--"] if IS_ROOT else []
)
"""A prefix for commands; root, too, is then bound by the permissions of files."""

needs_permissions = pytest.mark.skipif(
    IS_ROOT and shutil.which("setpriv") is None, reason="root may read everything, and setpriv is missing"
)


def backupd(stage: Stage, *arguments: str) -> Done:
    """Run a command without root's right to ignore file permissions."""
    return subprocess.run(
        [*_WITHOUT_OVERRIDES, sys.executable, "-m", "backupd", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, "BACKUPD_CONFIG": str(stage.config)},
    )


def assert_refused(done: Done, *words: str, faults: int | None = 1) -> None:
    """Check that a command prints the mistakes and hints on standard error; only `run` logs an event, too."""
    assert done.returncode == 78, done
    if "run" in done.args:
        event = json.loads(done.stdout)
        check_line(event)
        assert (event["event"], event["level"]) == ("daemon.start_failed", "error")
        first = event["error"].splitlines()[0]
        assert done.stderr.startswith(f"backupd: {printable(first)}\n")
    else:
        assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("backupd: ")
    for each in words:
        assert each in done.stderr
    if faults is not None:
        stated = [line for line in lines[1:] if line and not line.startswith(" ")]
        assert len(stated) == faults


MANY_MISTAKES = """
shutdown = "2s"
log.format = "xml"

[drop.switches]
path = "srv/backups"
stable_for = "two"
rescan_every = "0s"
min_size = "much"
observer = "hope"
sent_dir = "../sent"
on_deliverd = "keep"

[drop.firewalls]
path = "/srv/firewalls"
destinations = ["vualt"]

[destination.vault]
url = "http://vault.example.net/upload"
worker = 2
success = [500]
fields = { note = "from {nmae}" }
headers = { Host = "x" }
cert = "/etc/backupd/tls/client.pem"
retry = { initial = "5m", max = "1s" }
receipt = { digest = "bdy" }
"""

FAULTS = (
    'shutdown: unknown key; did you mean "shutdown_grace"?',
    'log.format: expected "auto", "json", "ecs" or "console", got "xml"',
    'drop.switches.path: expected an absolute path, got "srv/backups"',
    'drop.switches.stable_for: expected a duration such as "2s", got "two"',
    'drop.switches.rescan_every: expected a duration longer than "0s", got "0s"',
    'drop.switches.min_size: expected a size such as "20MB", got "much"',
    'drop.switches.observer: expected "auto", "inotify" or "polling", got "hope"',
    'drop.switches.sent_dir: expected a folder below the drop folder, without "..", got "../sent"',
    'drop.switches.on_deliverd: unknown key; did you mean "on_delivered"?',
    'drop.firewalls.destinations: no destination is named "vualt"; did you mean "vault"?',
    "destination.vault.url: expected https; plain http is for loopback addresses only",
    'destination.vault.worker: unknown key; did you mean "workers"?',
    "destination.vault.success[0]: expected at most 299, got 500",
    'destination.vault.fields.note: unknown placeholder {nmae}; did you mean "name"?',
    "destination.vault.headers.Host: Host is set by backupd itself",
    'destination.vault.cert: expected "key" to be set too',
    'destination.vault.retry.max: expected at least initial, "5m", got "1s"',
    'destination.vault.receipt.digest: expected "body:/json/pointer"',
)


@pytest.mark.long
@pytest.mark.parametrize("command", ["run", "check", "status", "list", "push", "config show", "retry --all"])
def test_reports_all_mistakes_of_a_configuration_at_once(stage: Stage, command: str) -> None:
    stage.config.write_text(MANY_MISTAKES)
    done = stage.backupd(*command.split(), *([str(stage.config)] if command == "push" else []))

    assert_refused(done, str(stage.config), *FAULTS, "hint: `backupd init`", faults=len(FAULTS))


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ["drop: required, but missing", "destination: required, but missing", "`backupd init`"]),
        (b"[drop\n", [":1:6: expected ']'", "[drop"]),
        (b'state_dir = "/var\n', [":1:18: illegal character"]),
        (b'[drop.a]\npath = "/a"\npath = "/b"\n', [":3:"]),
        (b"# f\xfcr\n", ["not UTF-8 at byte 3", "hint: save it as UTF-8"]),
        (b"\x00", [":1:1:"]),
        (b"a = " + b"[" * 5000, ["nested too deeply"]),
        (b"a = " + b"9" * 5000, ["too many digits"]),
        (b"drop = 7\ndestination = []\n", ["drop: expected a table, got 7", "destination: expected a table"]),
    ],
)
def test_refuses_a_file_that_is_no_valid_toml_configuration(
    stage: Stage, text: bytes, words: list[str]
) -> None:
    stage.config.write_bytes(text)
    assert_refused(stage.backupd("run"), str(stage.config), *words, faults=None)


def test_reports_a_missing_configuration(stage: Stage) -> None:
    assert_refused(stage.backupd("run"), f"{stage.config}: no such file", "hint: `backupd init`", faults=0)


def test_refuses_a_folder_as_the_configuration(stage: Stage) -> None:
    stage.config.mkdir()
    assert_refused(stage.backupd("run"), f"{stage.config}: is a directory", "hint: ", faults=0)


@needs_permissions
def test_reports_a_configuration_without_read_permission(stage: Stage) -> None:
    stage.configure(UNREACHABLE_URL)
    stage.config.chmod(0)
    assert_refused(
        backupd(stage, "run"), f"{stage.config}: permission denied", "the daemon's user must", faults=0
    )


def test_names_the_environment_variable_of_an_invalid_value(stage: Stage) -> None:
    stage.configure(UNREACHABLE_URL)
    done = stage.backupd("run", environ={"BACKUPD_LOG__LEVEL": "loud"})
    assert_refused(done, 'BACKUPD_LOG__LEVEL: expected "debug", "info", "warning" or "error", got "loud"')


@pytest.mark.long
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://vault.example.net/", "expected https; plain http is for loopback"),
        ("https:///upload", "expected a URL such as https://host/path"),
        ("vault.example.net/upload", "expected a URL such as https://host/path"),
        ("https://user:geheim@vault.example.net/", "without a user name or password"),
        ("https://vault.example.net/{name", 'write "{{" and "}}" for braces'),
        ("https://vault.example.net/{nmae}", 'unknown placeholder {nmae}; did you mean "name"?'),
        ("https://vault.example.net:99999/", "expected a URL"),
        ("https://[::1/", "expected a URL"),
        ("https://vault.example.net/a b", "without blanks"),
    ],
)
def test_refuses_an_invalid_url_without_printing_its_password(stage: Stage, url: str, words: str) -> None:
    stage.configure(url)
    done = stage.backupd("run")
    assert_refused(done, "destination.vault.url: ", words)
    assert "geheim" not in done.stderr


def _no_drop(stage: Stage) -> None:
    stage.drop.rmdir()


def _a_file_as_drop(stage: Stage) -> None:
    stage.drop.rmdir()
    stage.drop.write_text("a file")


def _no_key(stage: Stage) -> None:
    stage.pki.client_key.unlink()


def _no_cert(stage: Stage) -> None:
    stage.pki.client_cert.unlink()


def _no_ca(stage: Stage) -> None:
    stage.pki.ca_pem.unlink()


def _a_folder_as_ca(stage: Stage) -> None:
    stage.pki.ca_pem.unlink()
    stage.pki.ca_pem.mkdir()


def _a_fifo_as_ca(stage: Stage) -> None:
    stage.pki.ca_pem.unlink()
    os.mkfifo(stage.pki.ca_pem)


def _another_key(stage: Stage) -> None:
    stage.pki.client_key.write_bytes(stage.pki.issue_client("other").key.read_bytes())


def _rubbish_as_key(stage: Stage) -> None:
    stage.pki.client_key.write_text("rubbish")


def _rubbish_as_cert(stage: Stage) -> None:
    stage.pki.client_cert.write_text("rubbish")


def _a_damaged_cert(stage: Stage) -> None:
    lines = stage.pki.client_cert.read_text().splitlines()
    stage.pki.client_cert.write_text("\n".join([*lines[:3], *lines[4:]]))


def _rubbish_as_ca(stage: Stage) -> None:
    stage.pki.ca_pem.write_text("rubbish")


def _expired(stage: Stage) -> None:
    pair = stage.pki.issue_expired_client()
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())


def _not_yet(stage: Stage) -> None:
    pair = stage.pki.issue_client("future", not_before=in_days(2))
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())


def _state_in_a_file(stage: Stage) -> None:
    stage.state.write_text("a file")


UNUSABLE: list[tuple[Callable[[Stage], None], str, str]] = [
    (_no_key, "destination.vault.key", "does not exist"),
    (_no_cert, "destination.vault.cert", "does not exist"),
    (_no_ca, "destination.vault.ca", "does not exist"),
    (_a_folder_as_ca, "destination.vault.ca", "can't be read: is a directory"),
    (_a_fifo_as_ca, "destination.vault.ca", "is not a regular file"),
    (_another_key, "destination.vault.key", "is not the key of the certificate in"),
    (_rubbish_as_key, "destination.vault.key", "contains no private key in PEM"),
    (_rubbish_as_cert, "destination.vault.cert", "contains no certificate in PEM"),
    (_a_damaged_cert, "destination.vault.cert", "contains a damaged certificate"),
    (_rubbish_as_ca, "destination.vault.ca", "contains no certificate in PEM"),
    (_expired, "destination.vault.cert", "which expired on 2001-01-01"),
    (_not_yet, "destination.vault.cert", "not valid before"),
]


@pytest.mark.long
@pytest.mark.parametrize(("break_it", "key", "words"), UNUSABLE)
def test_a_destination_with_an_unusable_file_is_paused_and_the_others_are_served(
    stage: Stage, receiver: RunningReceiver, break_it: Callable[[Stage], None], key: str, words: str
) -> None:
    intact = shutil.copytree(stage.pki.folder, stage.base / "intact")
    annex = stage.annex(receiver.url).replace(str(stage.pki.folder), str(intact))
    stage.configure(receiver.url, top='heartbeat_every = "1s"', more=annex)
    break_it(stage)
    checked = stage.backupd("check", "--offline")
    assert checked.returncode == BAD_CONFIG
    assert f"failed: {key}: {stage.base}" in checked.stdout

    daemon = stage.daemon().ready()
    (paused,) = daemon.wait_for("destination.paused", destination="vault", reason="local_files_unusable")
    assert str(stage.pki.folder) in paused["error"]
    assert words in paused["error"]
    status = stage.backupd("status", "--check")
    assert status.returncode == 2
    assert "vault" in status.stdout
    stage.put("sw.cfg", b"content")
    daemon.wait_for("delivery.verified", destination="annex")
    assert {event["destination"] for event in daemon.events("delivery.verified")} == {"annex"}

    for path in stage.pki.folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(intact, stage.pki.folder, dirs_exist_ok=True)
    daemon.wait_for("destination.resumed", destination="vault")
    daemon.wait_for("archive.disposed", archive="sw.cfg")
    assert stage.backupd("status", "--check").returncode == 0
    assert daemon.stop() == 0


@pytest.mark.long
def test_the_daemon_does_not_start_with_an_unusable_state_folder(stage: Stage) -> None:
    stage.configure(UNREACHABLE_URL)
    _state_in_a_file(stage)
    done = stage.backupd("run")

    assert_refused(
        done, f"{stage.config} can't be run:", f"\nstate_dir: {stage.base}", "is not a folder", "\n  hint: "
    )
    checked = stage.backupd("check", "--offline")
    assert checked.returncode == 78
    assert f"failed: state_dir: {stage.base}" in checked.stdout


@pytest.mark.parametrize(
    ("break_it", "words", "error"),
    [
        (_no_drop, "does not exist", "No such file or directory"),
        (_a_file_as_drop, "is not a folder", "Not a directory"),
    ],
)
def test_the_daemon_starts_with_an_unusable_drop_folder_that_check_reports(
    stage: Stage, break_it: Callable[[Stage], None], words: str, error: str
) -> None:
    stage.configure(UNREACHABLE_URL)
    break_it(stage)
    checked = stage.backupd("check", "--offline")
    assert checked.returncode == BAD_CONFIG
    assert f"failed: drop.switches.path: {stage.drop} {words}" in checked.stdout
    daemon = stage.daemon().ready()
    assert f"{stage.drop} {words}" in daemon.events("config.warning")[0]["error"]
    assert daemon.events("drop.failed")[0]["error"] == error
    assert stage.backupd("status", "--check").returncode == 2
    assert daemon.stop() == 0


def test_an_encrypted_key_without_a_password_file_is_refused_without_a_prompt(stage: Stage) -> None:
    stage.configure(UNREACHABLE_URL)
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    key = serialization.load_pem_private_key(stage.pki.client_key.read_bytes(), None)
    stage.pki.client_key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"geheim"),
        )
    )
    checked = stage.backupd("check", "--offline")
    assert checked.returncode == BAD_CONFIG
    assert "destination.vault.key: " in checked.stdout
    assert "key_password_file" in checked.stdout
    daemon = stage.daemon().ready()
    (paused,) = daemon.wait_for("destination.paused", reason="local_files_unusable")
    assert "is encrypted" in paused["error"]
    assert daemon.stop() == 0


def _unreadable(path: str) -> Callable[[Stage], Path]:
    return lambda stage: {
        "drop": stage.drop,
        "key": stage.pki.client_key,
        "cert": stage.pki.client_cert,
        "ca": stage.pki.ca_pem,
        "the folder of the keys": stage.pki.folder,
    }[path]


@contextmanager
def closed(path: Path, mode: int = 0) -> Iterator[None]:
    """Remove the permissions of a path during a `with` block."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.long
@needs_permissions
@pytest.mark.parametrize(
    ("what", "key", "faults"),
    [
        ("key", "destination.vault.key", 1),
        ("cert", "destination.vault.cert", 1),
        ("ca", "destination.vault.ca", 1),
        ("the folder of the keys", "destination.vault.ca", 3),
    ],
)
def test_reports_an_unreadable_path_with_the_uid_of_the_daemon(
    stage: Stage, what: str, key: str, faults: int
) -> None:
    stage.configure(UNREACHABLE_URL)
    with closed(_unreadable(what)(stage)):
        done = backupd(stage, "check", "--offline")
    assert done.returncode == BAD_CONFIG
    assert f"\nfailed: {key}: " in f"\n{done.stdout}"
    assert f"(uid {os.geteuid()})" in done.stdout
    assert done.stdout.count("failed: ") == faults


@needs_permissions
@pytest.mark.parametrize("mode", [0, 0o500])
def test_check_reports_a_drop_folder_without_permissions(stage: Stage, mode: int) -> None:
    stage.configure(UNREACHABLE_URL)
    with closed(stage.drop, mode):
        done = backupd(stage, "check", "--offline")
    assert done.returncode == BAD_CONFIG
    assert f"failed: drop.switches.path: {stage.drop} can't be read, written and searched" in done.stdout
    assert f"(uid {os.geteuid()})" in done.stdout


@pytest.mark.long
@needs_permissions
@pytest.mark.parametrize("there", [True, False])
def test_reports_a_state_folder_without_write_permission(stage: Stage, there: bool) -> None:
    parent = stage.base / "var"
    stage.state = parent / "backupd"
    (stage.state if there else parent).mkdir(parents=True)
    stage.configure(UNREACHABLE_URL)
    with closed(stage.state if there else parent, 0o500):
        done = backupd(stage, "run")
    assert_refused(done, f"\nstate_dir: {stage.state} can't be {'written to' if there else 'created'}")


@pytest.mark.long
@needs_permissions
@pytest.mark.parametrize("command", ["status", "list", "retry --all"])
def test_commands_report_a_state_folder_without_read_permission(stage: Stage, command: str) -> None:
    stage.state.mkdir()
    stage.configure(UNREACHABLE_URL)
    with closed(stage.state):
        done = backupd(stage, *command.split())
    assert_refused(done, str(stage.state), "hint: run this", faults=0)


@pytest.mark.root
def test_refuses_a_sent_folder_on_another_filesystem(stage: Stage) -> None:
    stage.configure(UNREACHABLE_URL)
    stage.sent.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(stage.sent)], check=False)
    if mounted.returncode:
        pytest.skip("this root may not mount")
    try:
        done = stage.backupd("run")
    finally:
        subprocess.run(["umount", str(stage.sent)], check=True)
    assert_refused(
        done,
        f"drop.switches.sent_dir: {stage.sent} is on another filesystem",
        "hint: name a folder on the same filesystem",
    )


def test_warnings_are_logged_and_the_daemon_starts(stage: Stage) -> None:
    pair = stage.pki.issue_client("soon", not_after=in_days(5))
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())
    stage.pki.client_key.chmod(0o644)
    stage.configure(UNREACHABLE_URL)
    daemon = stage.daemon().ready()
    warnings = {event["path"]: event["error"] for event in daemon.events("config.warning")}
    assert set(warnings) == {"destination.vault.cert", "destination.vault.key"}
    assert "expires on" in warnings["destination.vault.cert"]
    assert "accessible to group or others" in warnings["destination.vault.key"]
    assert daemon.stop() == 0


def test_pipes_sockets_links_and_empty_files_in_a_drop_folder_are_ignored(stage: Stage) -> None:
    stage.configure(UNREACHABLE_URL)
    os.mkfifo(stage.drop / "pipe.tar.gz")
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(stage.drop, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{folder}/socket.tar.gz")  # a path of its own may be too long
        os.close(folder)
    (stage.drop / "link.tar.gz").symlink_to("/dev/zero")
    (stage.drop / "empty.tar.gz").touch()
    daemon = stage.daemon().ready()
    ignored = daemon.wait_for("archive.ignored", count=4)

    assert {(event["archive"], event["reason"]) for event in ignored} == {
        ("pipe.tar.gz", "not_a_regular_file"),
        ("socket.tar.gz", "not_a_regular_file"),
        ("link.tar.gz", "symlink"),
        ("empty.tar.gz", "too_small"),
    }
    assert not daemon.events("archive.queued")
    assert daemon.stop() == 0


def test_the_daemon_starts_with_a_valid_ca_that_issued_nothing_here(stage: Stage) -> None:
    """Only a TLS handshake shows that the CA is the wrong one, and the daemon logs it then."""
    other = Pki(stage.base / "other")
    stage.pki.ca_pem.write_bytes(other.ca_pem.read_bytes())
    stage.configure(UNREACHABLE_URL)
    assert stage.daemon().ready().stop() == 0
