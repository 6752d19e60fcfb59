"""Every command as a process: its standard output, standard error and exit code."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from backupd.core.errors import PENDING
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.e2e.test_outages import Endpoint
from tests.pki import Pki, in_days
from tests.scripted import Peer, ScriptedServer, accept_all, server_context
from tests.stage import TIMEOUT, Daemon, Stage, until

COMMAND = [sys.executable, "-m", "backupd"]
Done = subprocess.CompletedProcess[str]


def output(done: Done) -> str:
    return done.stdout + done.stderr


def in_a_terminal(stage: Stage, *arguments: str) -> tuple[int, str]:
    """Run a command with a terminal for its input and outputs; return its exit code and its output."""
    pid, terminal = pty.fork()
    if pid == 0:
        environ = {**os.environ, "BACKUPD_CONFIG": str(stage.config), "TERM": "xterm-256color"}
        os.execve(sys.executable, [*COMMAND, *arguments], environ)
    written = b""
    end = time.monotonic() + TIMEOUT
    try:
        while time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    data = os.read(terminal, 65536)
                except OSError:  # Linux: no process has the other end open
                    break
                if not data:
                    break
                written += data
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), written.decode()


def a_delivered_archive(stage: Stage, receiver: RunningReceiver, *names: str | bytes) -> Daemon:
    """Deliver archives with a daemon, and return it."""
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    for number, name in enumerate(names or ("sw.tar.gz",)):
        stage.put(name, b"content %d" % number)
    daemon.wait_for("archive.disposed", count=len(names) or 1)
    return daemon


@pytest.fixture
def archive(stage: Stage) -> Path:
    """An archive outside the drop folder."""
    path = stage.base / "router.tar.gz"
    path.write_bytes(b"a router's configuration")
    return path


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "backupd demo"),
        ("run", "SIGTERM"),
        ("check", "TLS handshake"),
        ("push", "verify the receipts"),
        ("status", "needs a person"),
        ("list", "newest first"),
        ("show", "each delivery with its attempts and its receipt"),
        ("audit", "sizes and digests in the receipt files"),
        ("notify", "test message to every target"),
        ("report", "without scripts"),
        ("retry", "rejected archives back"),
        ("init", "commented configuration"),
        ("config", "schema"),
        ("config schema", "JSON Schema of the configuration"),
        ("config show", "secrets left out"),
        ("receive", "reference receiver"),
        ("demo", "throw-away CA"),
    ],
)
def test_help_describes_each_command(stage: Stage, command: str, words: str) -> None:
    done = stage.backupd(*command.split(), "--help", environ={"COLUMNS": "200"})

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(words, re.sub(r"\s+", " ", done.stdout))


def test_help_lists_the_exit_codes(stage: Stage) -> None:
    text = re.sub(r"\s+", " ", stage.backupd("--help").stdout)
    for code in ("0 done", "1 bug", "2 usage", "3 something was rejected", "69 a destination", "78 config"):
        assert code in text


def test_prints_the_version(stage: Stage) -> None:
    done = stage.backupd("--version")
    assert re.fullmatch(r"backupd \d+\.\d+\S*\n", done.stdout)


@pytest.mark.long
@pytest.mark.parametrize(
    "wrong",
    [["nonsense"], ["push"], ["show"], ["list", "--state", "lost"], ["list", "--limit", "0"], ["retry"]],
)
def test_exits_with_2_for_an_invalid_command_line(stage: Stage, wrong: list[str]) -> None:
    stage.configure("https://127.0.0.1:9/")
    done = stage.backupd(*wrong)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in output(done)


# --- push ---------------------------------------------------------------------------------------


def test_push_delivers_a_file_and_leaves_it_in_place(
    stage: Stage, receiver: RunningReceiver, archive: Path
) -> None:
    stage.configure(receiver.url)
    done = stage.backupd("push", str(archive))

    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar, as it is no terminal
    assert done.stdout == f"router.tar.gz → vault: delivered, sha256:{digest}\n"
    assert [path.read_bytes() for path in stage.stored()] == [archive.read_bytes()]
    assert archive.exists()
    assert not stage.state.exists()


def test_push_reports_each_of_several_files_in_json(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    files = [stage.base / f"sw-{number}.cfg" for number in range(3)]
    for file in files:
        file.write_text(file.name)
    done = stage.backupd("push", "--json", *map(str, files))

    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert [each["file"] for each in printed] == [file.name for file in files]
    assert {each["outcome"] for each in printed} == {"delivered"}
    assert printed[0]["digest"] == f"sha256:{hashlib.sha256(files[0].read_bytes()).hexdigest()}"
    assert len(stage.stored()) == 3


@pytest.mark.long
def test_push_exits_with_3_if_one_of_the_files_is_rejected(stage: Stage, archive: Path) -> None:
    large = stage.base / "large.tar.gz"
    large.write_bytes(os.urandom(200_000))
    with RunningReceiver(stage.store, _tls(stage.pki), max_size=1000) as receiver:
        stage.configure(receiver.url)
        done = stage.backupd("push", str(large), str(archive))
        printed = json.loads(stage.backupd("push", "--json", str(large)).stdout)

    assert done.returncode == 3
    assert "large.tar.gz → vault: rejected (too_large): 413" in done.stdout
    assert "hint: raise the destination's limit, then push it again" in done.stdout
    assert "router.tar.gz → vault: delivered" in done.stdout
    assert (printed[0]["reason"], printed[0]["http_status"]) == ("too_large", 413)


def test_push_exits_with_69_if_the_destination_is_unavailable(stage: Stage, archive: Path) -> None:
    stage.configure("https://127.0.0.1:9/")
    done = stage.backupd("push", str(archive))

    assert done.returncode == 69
    assert "NOT delivered (connect_failed): Connection refused" in done.stdout
    assert "hint: " in done.stdout


@pytest.mark.long
def test_push_selects_destinations_and_refuses_an_unknown_one(
    stage: Stage, receiver: RunningReceiver, archive: Path
) -> None:
    other = f'[destination.cellar]\nurl = "https://127.0.0.1:9/"\nca = "{stage.pki.ca_pem}"'
    stage.configure(receiver.url, more=other)

    assert stage.backupd("push", "--to", "vault", str(archive)).returncode == 0
    assert stage.backupd("push", str(archive)).returncode == 69
    unknown = stage.backupd("push", "--to", "vualt", str(archive))
    assert unknown.returncode == 2
    assert "no destination named vualt" in unknown.stderr
    assert "vault, cellar" in unknown.stderr


@pytest.mark.long
def test_push_checks_all_files_before_the_first_upload(
    stage: Stage, receiver: RunningReceiver, archive: Path
) -> None:
    stage.configure(receiver.url)
    link = stage.base / "link.tar.gz"
    link.symlink_to(archive)
    for wrong, words in (
        (stage.base / "none.tar.gz", "No such file"),
        (stage.base, "not a regular file"),
        (link, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
    ):
        done = stage.backupd("push", str(archive), str(wrong))
        assert done.returncode == 2
        assert str(wrong) in done.stderr
        assert words in done.stderr
        assert done.stdout == ""
    assert stage.stored() == []


@pytest.mark.long
def test_push_reports_a_file_that_disappears_and_delivers_all_others(stage: Stage, archive: Path) -> None:
    gone, last = stage.base / "gone.tar.gz", stage.base / "last.tar.gz"
    for path in (gone, last):
        path.write_bytes(b"content")

    def remove_then_accept(peer: Peer) -> None:
        gone.unlink(missing_ok=True)
        accept_all(peer)

    with ScriptedServer(remove_then_accept, server_context(stage.pki)) as server:
        stage.configure(server.url)
        done = stage.backupd("push", "--json", str(archive), str(gone), str(last))

    results = {each["file"]: (each["outcome"], each["reason"]) for each in json.loads(done.stdout)}
    assert done.returncode == PENDING
    assert results == {
        archive.name: ("delivered", None),
        "gone.tar.gz": ("deferred", "archive_unreadable"),
        "last.tar.gz": ("delivered", None),
    }


@pytest.mark.long
def test_push_shows_a_progress_bar_on_a_terminal(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    large = stage.base / "large.tar.gz"
    large.write_bytes(os.urandom(30_000_000))
    code, text = in_a_terminal(stage, "push", str(large))

    assert code == 0
    assert "━" in text
    assert "MiB" in text
    assert "large.tar.gz → vault: delivered\r\n  sha256:" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def _tls(pki: Pki) -> ServerTls:
    return ServerTls(pki.server_cert, pki.server_key, pki.ca_pem)


# --- check --------------------------------------------------------------------------------------


def test_check_reports_a_usable_configuration_and_destination(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    done = stage.backupd("check")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "ok: configuration, folders, keys and certificates"
    assert "ok: destination.vault: " in done.stdout
    assert "TLSv1.3" in done.stdout
    assert stage.stored() == []


def _trust_another_ca(stage: Stage) -> None:
    stage.pki.ca_pem.write_bytes(Pki(stage.base / "other").ca_pem.read_bytes())


def _use_an_unknown_client_certificate(stage: Stage) -> None:
    stranger = Pki(stage.base / "other")
    stage.pki.client_cert.write_bytes(stranger.client_cert.read_bytes())
    stage.pki.client_key.write_bytes(stranger.client_key.read_bytes())


@pytest.mark.long
@pytest.mark.parametrize(
    ("break_it", "reason", "words"),
    [
        (_trust_another_ca, "tls_failed", "the destination's certificate: "),
        (_use_an_unknown_client_certificate, "client_certificate_refused", "alert unknown ca"),
    ],
)
def test_check_and_push_report_which_certificate_is_not_trusted(
    stage: Stage, archive: Path, break_it: Any, reason: str, words: str
) -> None:
    large = stage.base / "large.tar.gz"
    large.write_bytes(os.urandom(3_000_000))
    with Endpoint(stage.pki, lambda name: 201) as endpoint:
        break_it(stage)
        stage.configure(endpoint.url)
        done = stage.backupd("check")
        [probe] = json.loads(stage.backupd("check", "--json").stdout)["destinations"]
        pushed = [stage.backupd("push", str(file)) for file in (archive, large)]

    assert endpoint.seen == []
    assert "Traceback" not in output(done)
    assert probe["reason"] == reason
    assert probe["hint"]
    for each in (done, *pushed):
        assert each.returncode == 69
        assert f"{reason})" in each.stdout
        assert words in each.stdout
        assert "hint: " in each.stdout


@pytest.mark.long
def test_check_suggests_the_client_certificate_if_the_endpoint_closes_without_an_alert(
    stage: Stage, receiver: RunningReceiver
) -> None:
    _use_an_unknown_client_certificate(stage)
    stage.configure(receiver.url)
    done = stage.backupd("check")
    assert done.returncode == 69
    assert "`cert`" in done.stdout


def test_check_reports_a_refused_connection_without_the_query_of_the_url(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/upload?token=geheim")
    done = stage.backupd("check")

    assert done.returncode == 69
    assert "failed: destination.vault: https://127.0.0.1:9/upload: " in done.stdout
    assert "connect_failed" in done.stdout
    assert "geheim" not in output(done)


def _no_key(stage: Stage) -> None:
    stage.pki.client_key.unlink()


def _another_key(stage: Stage) -> None:
    stage.pki.client_key.write_bytes(stage.pki.issue_client("other").key.read_bytes())


def _expired(stage: Stage) -> None:
    pair = stage.pki.issue_expired_client()
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())


@pytest.mark.long
@pytest.mark.parametrize(
    ("break_it", "key", "words"),
    [
        (_no_key, "destination.vault.key", "does not exist"),
        (_another_key, "destination.vault.key", "is not the key of the certificate"),
        (_expired, "destination.vault.cert", "which expired on 2001-01-01"),
    ],
)
def test_check_names_the_unusable_file_and_exits_with_78(
    stage: Stage, receiver: RunningReceiver, break_it: Any, key: str, words: str
) -> None:
    stage.configure(receiver.url)
    break_it(stage)
    for arguments in (["check"], ["check", "--offline"]):
        done = stage.backupd(*arguments)
        assert done.returncode == 78
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"failed: {key}: ")]
        assert words in line
        assert "Traceback" not in output(done)
        assert "run `backupd check`" not in output(done)  # this command is it
    printed = json.loads(stage.backupd("check", "--json", "--offline").stdout)
    assert {"where": key, "fatal": True}.items() <= next(p for p in printed["problems"] if p["fatal"]).items()
    assert printed["destinations"] == []


def test_check_warns_of_a_certificate_that_expires_soon(stage: Stage, receiver: RunningReceiver) -> None:
    pair = stage.pki.issue_client("soon", not_after=in_days(5))
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())
    stage.configure(receiver.url)
    done = stage.backupd("check")

    assert done.returncode == 0
    assert "warning: destination.vault.cert: " in done.stdout
    assert "expires on" in done.stdout


def test_check_offline_connects_to_no_destination(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    assert stage.backupd("check", "--offline").returncode == 0


# --- status, list, show -------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "command", [["status"], ["list"], ["show", "0"], ["retry", "--all"], ["report", "--html", "-"]]
)
def test_commands_report_the_missing_ledger_before_the_first_start(stage: Stage, command: list[str]) -> None:
    stage.configure("https://127.0.0.1:9/")
    done = stage.backupd(*command)
    assert done.returncode == 78
    assert "no ledger here yet" in done.stderr
    assert "hint: " in done.stderr
    assert not stage.state.exists()


@pytest.mark.long
def test_status_reports_whether_the_daemon_runs(stage: Stage, receiver: RunningReceiver) -> None:
    daemon = a_delivered_archive(stage, receiver)
    running = stage.backupd("status")
    printed = json.loads(stage.backupd("status", "--json").stdout)
    assert running.returncode == 0
    assert re.search(rf"running for \d+ s as process {daemon.pid}; state of \d+ s ago", running.stdout)
    assert "nothing needs attention" in running.stdout
    assert re.search(r"vault +working +0 ", running.stdout)
    assert re.search(r"certificate of vault: \d+ days left", running.stdout)
    assert printed["daemon_pid"] == daemon.pid
    [destination] = printed["destinations"]
    assert (destination["name"], destination["circuit"], destination["pending"]) == ("vault", "working", 0)
    assert destination["last_delivered"].endswith("Z")

    daemon.stop()
    assert ": NOT RUNNING; state of" in stage.backupd("status").stdout
    assert json.loads(stage.backupd("status", "--json").stdout)["daemon_pid"] is None


@pytest.mark.long
def test_status_reports_why_a_destination_is_paused(stage: Stage) -> None:
    stage.configure(
        "https://127.0.0.1:9/", destination='[destination.vault.retry]\ninitial = "1h"\nmax = "1h"'
    )
    daemon = stage.daemon().ready()
    stage.put("sw.tar.gz", b"content")
    daemon.wait_for("delivery.deferred")
    done = stage.backupd("status")

    assert re.search(r"vault +paused +1 \(7 B\) .* in \d+ min", done.stdout)
    assert "connect_failed: Connection refused (127.0.0.1 port 9)" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("running", [True, False])
def test_list_and_show_report_each_delivery(stage: Stage, receiver: RunningReceiver, running: bool) -> None:
    daemon = a_delivered_archive(stage, receiver, "one.tar.gz", "two.tar.gz")
    if not running:
        daemon.stop()
    listed = stage.backupd("list")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert re.search(r"delivered +switches +one\.tar\.gz +9 B +vault", listed.stdout)
    records = json.loads(stage.backupd("list", "--json").stdout)
    assert sorted(r["archive"]["relpath"] for r in records) == ["one.tar.gz", "two.tar.gz"]
    assert json.loads(stage.backupd("list", "--json", "-n", "1").stdout) == records[:1]
    assert json.loads(stage.backupd("list", "--json", "--state", "rejected").stdout) == []
    assert stage.backupd("list", "--state", "rejected").stdout == "no rejected deliveries\n"

    record = records[0]
    shown = stage.backupd("show", record["id"][:8])
    assert shown.returncode == 0
    for words in (record["id"], record["digest"], "verified     yes", f"sent/{record['archive']['relpath']}"):
        assert words in shown.stdout
    printed = json.loads(stage.backupd("show", "--json", record["id"]).stdout)
    assert printed["delivery"] == record
    assert [(a["number"], a["outcome"], a["http_status"]) for a in printed["attempts"]] == [
        (1, "delivered", 201)
    ]


@pytest.mark.long
def test_show_and_retry_refuse_unknown_and_ambiguous_ids(stage: Stage, receiver: RunningReceiver) -> None:
    names = [f"sw-{number}.tar.gz" for number in range(17)]  # two ids begin with the same hexadecimal digit
    a_delivered_archive(stage, receiver, *names)
    firsts = [record["id"][0] for record in json.loads(stage.backupd("list", "--json").stdout)]
    shared = next(digit for digit in firsts if firsts.count(digit) > 1)
    for command in ("show", "retry"):
        ambiguous = stage.backupd(command, shared)
        assert ambiguous.returncode == 2
        assert "several deliveries" in ambiguous.stderr
        unknown = stage.backupd(command, "xyz")
        assert unknown.returncode == 2
        assert "no delivery matches 'xyz'" in unknown.stderr


@pytest.mark.long
@pytest.mark.parametrize("command", ["show", "retry", "forget"])
def test_an_id_that_is_not_utf_8_is_unknown(stage: Stage, receiver: RunningReceiver, command: str) -> None:
    a_delivered_archive(stage, receiver, "sw-1.tar.gz")
    done = stage.backupd(command, os.fsdecode(b"\xff"))

    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_show_has_a_hint_for_a_rejected_archive(stage: Stage) -> None:
    with RunningReceiver(stage.store, _tls(stage.pki), max_size=1000) as receiver:
        stage.configure(receiver.url)
        daemon = stage.daemon().ready()
        stage.put("large.tar.gz", os.urandom(200_000))
        daemon.wait_for("archive.disposed")
    [record] = json.loads(stage.backupd("list", "--json").stdout)
    done = stage.backupd("show", record["id"])

    assert re.search(r"^state +rejected$", done.stdout, re.MULTILINE)
    assert re.search(r"^reason +too_large$", done.stdout, re.MULTILINE)
    assert re.search(r"^hint +raise the destination's limit", done.stdout, re.MULTILINE)
    assert re.search(r"^moved to +rejected/large\.tar\.gz$", done.stdout, re.MULTILINE)


HOSTILE = b"bad\xff\n\r\x1b[2Jdelivered\xe2\x80\xae\x07 [bold]{x}%s \xf0\x9f\x92\xbe.tar.gz"


@pytest.mark.long
def test_hostile_names_forge_no_output_on_a_terminal(stage: Stage, receiver: RunningReceiver) -> None:
    daemon = a_delivered_archive(stage, receiver, HOSTILE)
    [record] = json.loads(stage.backupd("list", "--json").stdout)
    pushed = Path(os.fsdecode(os.path.join(os.fsencode(stage.base), HOSTILE)))
    pushed.write_bytes(b"content")
    harmless = r"bad\xff\n\r\x1b[2Jdelivered\u202e\x07 [bold]{x}%s 💾.tar.gz"
    missing = f"{pushed}.none"
    for done in (
        stage.backupd("list"),
        stage.backupd("show", record["id"]),
        stage.backupd("push", os.fsdecode(pushed)),
        stage.backupd("push", missing),
    ):
        text = output(done)
        assert harmless.replace(r"bad\xff", "") in text
        assert not set(text) & {"\r", "\x1b", "\x07", "\u202e"}
        assert not [line for line in text.splitlines() if line.startswith("delivered")]
    code, text = in_a_terminal(stage, "push", os.fsdecode(pushed))
    assert code == 0
    assert "\x1b[2Jdelivered" not in text
    assert "\x07" not in text
    assert daemon.stop() == 0
    assert len(daemon.events("archive.delivered")) == 1  # every line of the log is JSON, too


def test_characters_that_the_locale_lacks_are_escaped(
    stage: Stage, receiver: RunningReceiver, archive: Path
) -> None:
    stage.configure(receiver.url)
    done = stage.backupd("push", str(archive), environ={"PYTHONIOENCODING": "latin-1:strict"})
    assert done.returncode == 0
    assert done.stdout.startswith(r"router.tar.gz \u2192 vault: delivered")


@pytest.mark.long
def test_a_closed_pipe_causes_no_traceback(stage: Stage, receiver: RunningReceiver) -> None:
    a_delivered_archive(stage, receiver, *(f"sw-{number}.tar.gz" for number in range(300)))
    command = f"{sys.executable} -m backupd list --json -n 1000 --config {stage.config} | head -n 1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_reports_a_full_disk_under_standard_output_without_a_traceback(stage: Stage) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [*COMMAND, "config", "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "backupd: [Errno 28] No space left on device\n"


# --- init, config -------------------------------------------------------------------------------


@pytest.mark.long
def test_check_accepts_the_configuration_of_init_once_it_is_filled_in(
    stage: Stage, receiver: RunningReceiver
) -> None:
    path = stage.base / "new.toml"
    done = stage.backupd("init", str(path))
    assert done.returncode == 0
    assert "backupd check" in done.stdout
    text = path.read_text()
    assert text == stage.backupd("init").stdout
    for example, real in (
        ('"/srv/backups/switches"', f'"{stage.drop}"'),
        ('"https://vault.example.net/v1/upload"', f'"{receiver.url}"'),
        ('"/etc/backupd/tls/ca.pem"', f'"{stage.pki.ca_pem}"'),
        ('"/etc/backupd/tls/client.pem"', f'"{stage.pki.client_cert}"'),
        ('"/etc/backupd/tls/client.key"', f'"{stage.pki.client_key}"'),
    ):
        assert example in text
        text = text.replace(example, real)
    path.write_text(text)

    done = stage.backupd("check", "--config", str(path), environ={"BACKUPD_STATE_DIR": str(stage.state)})
    assert done.returncode == 0, output(done)


@pytest.mark.long
def test_init_never_overwrites_a_file(stage: Stage) -> None:
    stage.config.write_text("mine")
    done = stage.backupd("init", str(stage.config))
    assert done.returncode == 2
    assert "an existing one is never overwritten" in done.stderr
    assert stage.config.read_text() == "mine"
    assert stage.backupd("init", str(stage.base / "no" / "folder.toml")).returncode == 2


def test_prints_a_json_schema_that_editors_can_use(stage: Stage) -> None:
    schema = json.loads(stage.backupd("config", "schema").stdout)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"drop", "destination", "state_dir"} <= set(schema["properties"])
    assert set(schema["required"]) == {"drop", "destination"}
    wanted = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert wanted == set(schema["$defs"])


@pytest.mark.long
def test_the_effective_configuration_has_no_secrets_and_can_be_loaded(stage: Stage) -> None:
    stage.configure(
        "https://127.0.0.1:9/upload?site=7&token=geheim1&sv=2024-11-04&sig=geheim%2B3&file={name}",
        destination="headers = { Authorization = 'Bearer geheim2', X-Site = '7', X-Pass = 'geheim4',"
        " X-Unknown = 'geheim5', X-Backup-Source = 'backupd {host}', X-From = '{host}' }",
    )
    done = stage.backupd("config", "show")
    assert (done.returncode, done.stderr) == (0, "")
    assert "geheim" not in done.stdout
    vault = tomllib.loads(done.stdout)["destination"]["vault"]
    assert vault["url"].endswith("/upload?site=7&token=***&sv=2024-11-04&sig=***&file={name}")
    hidden = [name for name, value in vault["headers"].items() if value == "***"]
    assert hidden == ["Authorization", "X-Pass", "X-Unknown"]

    again = stage.base / "again.toml"
    again.write_text(done.stdout)
    assert stage.backupd("config", "show", "--config", str(again)).stdout == done.stdout


# --- receive, demo ------------------------------------------------------------------------------


@pytest.mark.long
def test_receive_stores_a_pushed_file(stage: Stage, archive: Path) -> None:
    p = stage.pki
    files = ["--cert", str(p.server_cert), "--key", str(p.server_key), "--client-ca", str(p.ca_pem)]
    log = stage.base / "receive.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*COMMAND, "receive", "--store", str(stage.store), "--port", "0", *files],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        found = until(lambda: re.search(r"receiving at (\S+), storing in (.*)\n", log.read_text()), "the url")
        stage.configure(found[1])
        assert stage.backupd("push", str(archive)).returncode == 0
        assert [path.read_bytes() for path in stage.stored()] == [archive.read_bytes()]
        process.terminate()
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
    assert log.read_text() == found[0]


@pytest.mark.long
def test_receive_prints_its_url_at_once_even_into_a_file(stage: Stage) -> None:
    p = stage.pki
    files = ["--cert", str(p.server_cert), "--key", str(p.server_key), "--client-ca", str(p.ca_pem)]
    log = stage.base / "receive.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*COMMAND, "receive", "--store", str(stage.store), "--port", "0", *files], stdout=stream
        )
    try:
        until(lambda: "receiving at https://" in log.read_text(), "the url")
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_receive_names_the_file_that_it_cannot_read(stage: Stage) -> None:
    p = stage.pki
    done = stage.backupd(
        *("receive", "--store", str(stage.store), "--cert", str(p.server_cert)),
        *("--key", str(stage.base / "none.key"), "--client-ca", str(p.ca_pem)),
    )
    assert done.returncode == 78
    assert f"--key: {stage.base / 'none.key'} can't be read" in done.stderr


@pytest.mark.long
def test_the_demo_delivers_its_archives(stage: Stage) -> None:
    done = stage.backupd("demo", environ={"TMPDIR": str(stage.base)})

    assert (done.returncode, done.stderr) == (0, "")
    [base] = stage.base.glob("backupd-demo-*")
    stored = {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.archives(base / "stored" / "archives")
    }
    sent = {hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.archives(base / "drop" / "sent")}
    digests = re.findall(r"sha256 (in|of) the .*\n +([0-9a-f]{64})\n", done.stdout)
    assert len(digests) == 4
    assert (
        stored
        == sent
        == {digest for word, digest in digests if word == "in"}
        == {digest for word, digest in digests if word == "of"}
    )
    assert "daemon.stopped" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.long
def test_the_demo_ignores_the_configuration_in_the_environment(stage: Stage) -> None:
    mine = {
        "BACKUPD_STATE_DIR": "relative",
        "BACKUPD_LOG__LEVEL": "nonsense",
        "STATE_DIRECTORY": "/nonexistent",
    }
    done = stage.backupd("demo", environ={**mine, "TMPDIR": str(stage.base)})
    assert done.returncode == 0, output(done)


def test_the_demo_names_the_missing_extra(stage: Stage) -> None:
    hidden = stage.base / "hidden"
    hidden.mkdir()
    (hidden / "fastapi.py").write_text("raise ImportError('no fastapi here')")
    done = stage.backupd("demo", environ={"PYTHONPATH": str(hidden)})
    assert done.returncode == 2
    assert "needs the extra `receiver`" in done.stderr
    assert "pip install 'backupd[receiver]'" in done.stderr


@pytest.mark.long
def test_the_demo_reports_a_full_disk(stage: Stage) -> None:
    no_files = ["prlimit", "--fsize=0", "--", *COMMAND, "demo"]
    environ = {**os.environ, "TMPDIR": str(stage.base), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(no_files, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environ)
    assert done.returncode == 69, output(done)
    assert "the demo can't run here: " in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in output(done)


@pytest.mark.long
def test_the_demo_stops_its_daemon_on_sigterm(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "backupd", "demo", "--keep"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert demo.stdout is not None
    pid = 0
    for line in demo.stdout:
        if '"event":"daemon.started"' in line:
            pid = json.loads(line)["pid"]
        if line.startswith("Drop files into"):
            break
    assert pid
    demo.terminate()
    demo.stdout.read()
    assert demo.wait() == 143
    demo.stdout.close()
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the daemon")
