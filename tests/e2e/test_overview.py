"""The commands status, list, show and audit as processes on real ledgers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from backupd.cli.audit import audit
from backupd.ledger.sqlite.connection import open_ledger
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.pki import in_days
from tests.scripted import Peer, ScriptedServer, accept_all, http_response, receipt_for, server_context
from tests.stage import TIMEOUT, Daemon, Stage, a_stage, until

STUCK = '[destination.vault.retry]\ninitial = "1h"\nmax = "1h"'


def a_sent_archive(stage: Stage, receiver: RunningReceiver, *names: str, **config: str) -> Daemon:
    """Deliver archives with a daemon, and return it."""
    stage.configure(receiver.url, **config)
    daemon = stage.daemon().ready()
    for name in names:
        folder = (stage.drop / name).parent
        folder.mkdir(exist_ok=True, parents=True)
        stage.put(Path(name).name, b"content of %s" % name.encode(), into=folder)
    daemon.wait_for("archive.disposed", count=len(names))
    return daemon


@pytest.fixture(scope="module")
def one_sent_saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, str, Path]]:
    """An installation that has delivered an archive, the id of the delivery, and a copy of its ledger."""
    base = tmp_path_factory.mktemp("one-sent")
    with contextlib.contextmanager(a_stage)(base) as stage:
        tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
        with RunningReceiver(stage.store, tls) as receiver:
            assert a_sent_archive(stage, receiver, "one.cfg").stop() == 0
        (record,) = json.loads(stage.backupd("list", "--json").stdout)
        shutil.copytree(stage.state, base / "saved")
        yield stage, record["id"], base / "saved"


@pytest.fixture
def one_sent(one_sent_saved: tuple[Stage, str, Path]) -> tuple[Stage, str]:
    """An installation that has delivered an archive, and the id of the delivery."""
    stage, ident, saved = one_sent_saved
    shutil.rmtree(stage.state)
    shutil.copytree(saved, stage.state)
    return stage, ident


def change(stage: Stage, statement: str, *values: object) -> None:
    """Change the ledger directly."""
    connection = open_ledger(stage.state).connection
    connection.execute(statement, values)
    connection.close()


def micros(ago: timedelta) -> int:
    return int((datetime.now(UTC) - ago).timestamp() * 1_000_000)


# a ledger that is damaged, or in use


@pytest.mark.long
@pytest.mark.parametrize(
    "damage",
    [
        "archive SET queued_at = 9000000000000000000",
        "archive SET queued_at = 'long ago'",
        "archive SET size = 'large'",
        "archive SET relpath = 5",
        "archive SET relpath = 'text'",
        "archive SET drop_name = x'00ff'",
        "archive SET disposed_at = 'later'",
        "delivery SET ended_at = 9000000000000000000",
        "delivery SET due_at = 'soon'",
        "attempt SET duration_us = 'long'",
        "snapshot SET state = 'x'",
        "snapshot SET state = '{}'",
    ],
)
def test_commands_report_damaged_values_in_the_ledger_without_a_traceback(
    one_sent: tuple[Stage, str], damage: str
) -> None:
    stage, ident = one_sent
    connection = open_ledger(stage.state).connection
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute(f"UPDATE {damage}")
    connection.close()
    refused = 0
    commands = (["list"], ["show", ident], ["status"], ["audit"], ["retry", ident], ["retry", "--all"])
    *results, checked = stage.commands(*commands, ["status", "--check"])
    for done in results:
        assert "Traceback" not in done.stdout + done.stderr, done.args
        if "the ledger can't be read" in done.stderr:
            assert "restart the daemon" in done.stderr
            refused += 1
        else:
            assert done.returncode in (0, 2, 3), done.args
    assert refused or damage.startswith("snapshot")
    assert checked.returncode in (2, 3)
    assert checked.stdout.startswith("CRITICAL - the daemon is not running")


@pytest.mark.long
def test_status_does_not_block_on_a_pipe_in_place_of_the_lock_file(
    stage: Stage, receiver: RunningReceiver
) -> None:
    assert a_sent_archive(stage, receiver, "one.cfg").stop() == 0
    (stage.state / "backupd.lock").unlink()
    os.mkfifo(stage.state / "backupd.lock")
    assert "NOT RUNNING" in stage.backupd("status").stdout


# status


@pytest.mark.long
def test_status_shows_each_drop(stage: Stage, receiver: RunningReceiver) -> None:
    a_sent_archive(stage, receiver, "one.cfg")
    text = stage.backupd("status").stdout
    assert re.search(rf"switches +{stage.drop} +inotify +0 +one\.cfg +\d+ s ago", text)
    assert "\x1b" not in text
    [drop] = json.loads(stage.backupd("status", "--json").stdout)["drops"]
    assert (drop["name"], drop["observer"], drop["pending"], drop["last"]) == (
        "switches", "inotify", 0, "one.cfg",
    )  # fmt: skip


def on_a_terminal(stage: Stage, *arguments: str, until_seen: str = "", **environ: str) -> str:
    """Run a command on a terminal; interrupt it with Ctrl-C once a pattern was written."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
        env = {**os.environ, "BACKUPD_CONFIG": str(stage.config), "TERM": "xterm-256color", **environ}
        os.execve(sys.executable, [sys.executable, "-m", "backupd", *arguments], env)
    written, end = b"", time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:
                break
            if not data:
                break
            written += data
            if until_seen and re.search(until_seen.encode(), written, re.DOTALL):
                os.write(terminal, b"\x03")
                until_seen = ""
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, written
    return written.decode()


@pytest.mark.long
def test_status_is_coloured_on_a_terminal_without_no_color(stage: Stage, receiver: RunningReceiver) -> None:
    a_sent_archive(stage, receiver, "one.cfg")
    assert re.search(r"\x1b\[32mbackupd .*: running for", on_a_terminal(stage, "status"))
    plain = on_a_terminal(stage, "status", NO_COLOR="1")
    assert ": running for" in plain
    assert "\x1b[32m" not in plain


def test_watch_refreshes_the_status_until_ctrl_c(stage: Stage, receiver: RunningReceiver) -> None:
    a_sent_archive(stage, receiver, "one.cfg")
    text = on_a_terminal(stage, "status", "--watch", until_seen=": running for.*: running for")
    assert text.count("\x1b[2J") >= 2
    assert "Traceback" not in text


def checked(stage: Stage, *arguments: str) -> tuple[int, str]:
    done = stage.backupd("status", "--check", *arguments)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.long
def test_check_is_ok_with_a_running_daemon_and_critical_without(
    stage: Stage, receiver: RunningReceiver
) -> None:
    daemon = a_sent_archive(stage, receiver, "one.cfg")
    code, line = checked(stage)
    assert code == 0
    assert re.fullmatch(r"OK - 0 pending, none rejected \| pending=0 pending_bytes=0B .*\n", line)
    daemon.stop()
    code, line = checked(stage)
    assert code == 2
    assert line.startswith("CRITICAL - the daemon is not running")


@pytest.mark.long
def test_check_warns_of_a_paused_destination_and_of_an_old_archive(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", destination=STUCK)
    daemon = stage.daemon().ready()
    stage.put("sw.cfg", b"content")
    daemon.wait_for("destination.paused")
    code, line = checked(stage)
    assert (code, "vault has been paused for " in line) == (1, True)
    change(stage, "UPDATE archive SET queued_at = ?", micros(timedelta(hours=7)))
    late = "oldest pending archive has waited for 7 h"
    until(lambda: late in checked(stage)[1], "the state after a change by another process")
    code, line = checked(stage, "--warning-age", "6h", "--critical-age", "8h")
    assert (code, late in line) == (1, True)
    assert checked(stage)[0] == 2


@pytest.mark.long
def test_check_warns_of_a_rejected_archive(stage: Stage) -> None:
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    with RunningReceiver(stage.store, tls, max_size=1000) as receiver:
        a_sent_archive(stage, receiver, "small.cfg")
        stage.put("large.cfg", os.urandom(200_000))
        until(lambda: stage.archives(stage.rejected), "a rejected archive")
        assert until(lambda: checked(stage)[0] == 1, "a warning")
    assert "1 archive rejected" in checked(stage)[1]
    assert "WARNING: 1 archive rejected" in stage.backupd("status").stdout


@pytest.mark.long
def test_files_that_will_not_be_sent_are_listed_until_they_are_gone(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(
        receiver.url, drop='rescan_every = "1s"\ninclude = ["*.cfg"]', top='heartbeat_every = "1s"'
    )
    daemon = stage.daemon().ready()
    stage.put("readme.pdf", b"abc")
    stage.put("empty.cfg", b"")
    daemon.wait_for("drop.problem", reason="not_included", problems=1)
    daemon.wait_for("drop.problem", reason="too_small", problems=1)

    code, line = checked(stage)
    assert code == 1
    assert line.startswith("WARNING - 1 file of switches: not included; 1 file of switches: too small |")
    assert "problems=2" in line
    text = stage.backupd("status").stdout
    assert "readme.pdf" in text
    assert "backupd list --problems" in text
    listed = json.loads(stage.backupd("list", "--problems", "--json").stdout)
    assert {each["relpath"]: each["reason"] for each in listed} == {
        "readme.pdf": "not_included",
        "empty.cfg": "too_small",
    }
    text = stage.backupd("list", "--problems", "--drop", "switches").stdout
    assert f"{stage.drop}/empty.cfg" in text
    assert "hint: " in text

    (stage.drop / "readme.pdf").unlink()
    (stage.drop / "empty.cfg").write_bytes(b"no longer")
    daemon.wait_for("drop.problem_solved", reason="not_included")
    daemon.wait_for("drop.problem_solved", reason="too_small")
    assert checked(stage)[0] == 0
    assert "no problems" in stage.backupd("list", "--problems").stdout


@pytest.mark.long
def test_problems_are_listed_without_criteria_of_deliveries(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    stage.daemon().ready().stop()
    done = stage.backupd("list", "--problems", "--name", "*.cfg")
    assert done.returncode == 2
    assert "--drop and --limit" in done.stderr


@pytest.mark.long
def test_a_delivered_file_that_cannot_be_moved_is_a_problem_until_it_is_moved(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"')
    daemon = stage.daemon().ready()
    stage.sent.write_bytes(b"a file in place of the folder")
    stage.put("r1.cfg", b"content")
    daemon.wait_for("drop.problem", reason="not_moved", problems=1)
    assert "1 file of switches: not moved" in checked(stage)[1]
    daemon.kill()
    stage.sent.unlink()
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.disposed")
    daemon.wait_for("drop.problem_solved", reason="not_moved")
    assert checked(stage)[0] == 0


@pytest.mark.long
@pytest.mark.parametrize(("days", "code"), [(10, 1), (2, 2)])
def test_check_warns_of_an_expiring_certificate(
    stage: Stage, receiver: RunningReceiver, days: int, code: int
) -> None:
    pair = stage.pki.issue_client("soon", not_after=in_days(days))
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())
    a_sent_archive(stage, receiver, "one.cfg")
    found, line = checked(stage)
    assert found == code
    assert "the certificate of vault expires in" in line


@pytest.mark.long
@pytest.mark.parametrize(("days", "code", "level"), [(4, 1, "WARNING"), (2, 2, "CRITICAL")])
def test_status_and_the_daemon_report_the_certificate_of_a_chain_that_expires_first(
    stage: Stage, receiver: RunningReceiver, days: int, code: int, level: str
) -> None:
    chained = stage.pki.issue_client_below_intermediate(in_days(days + 0.5))
    stage.pki.client_cert.write_bytes(chained.cert.read_bytes())
    stage.pki.client_key.write_bytes(chained.key.read_bytes())
    daemon = a_sent_archive(stage, receiver, "one.cfg")

    [heartbeat, *_] = daemon.wait_for("daemon.heartbeat")
    assert heartbeat["days_left_by_destination"] == {"vault": days}
    [status] = daemon.wait_for("destination.status")[:1]
    certificate, _ = json.loads(stage.backupd("status", "--json").stdout)["certificates"]
    assert certificate["path"] == str(stage.pki.client_cert)
    state = {"destination": "vault", "days_left": days, "state": status["certificate_state"]}
    assert certificate.items() >= {**state, "role": "client"}.items()
    assert (
        f"certificate of vault: {days} days left ({stage.pki.client_cert})" in stage.backupd("status").stdout
    )
    found, line = checked(stage)
    assert found == code
    assert line.startswith(f"{level} - the certificate of vault expires in {days} days | ")
    assert re.search(rf"certificate_days={days}\.\d+;14:;3:", line)


@pytest.mark.long
@pytest.mark.parametrize(
    ("hours", "state", "code", "words"),
    [
        (12.0, "valid", 0, "OK"),
        (5.5, "expiring", 1, "the certificate of vault expires in 5 h"),
        (2.2, "critical", 2, "the certificate of vault expires in 2 h"),
    ],
)
def test_a_certificate_that_lives_a_day_is_judged_by_its_lifetime_everywhere(
    stage: Stage, hours: float, state: str, code: int, words: str
) -> None:
    begin, end = in_days((hours - 24) / 24), in_days(hours / 24)
    pair = stage.pki.issue_client("daily", not_before=begin, not_after=end)
    server_pair = stage.pki.issue_server("day", not_before=begin, not_after=end)
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())
    with ScriptedServer(accept_all, server_context(stage.pki, server_pair)) as server:
        stage.configure(server.url, top='heartbeat_every = "1s"')
        daemon = stage.daemon().ready()
        stage.put("r1.cfg", b"content")
        daemon.wait_for("archive.disposed")
        found, line = checked(stage)
        assert (found, words in line) == (code, True), line
        assert f"certificate of vault: {hours:.0f}"[:-1] in stage.backupd("status").stdout
        daemon.wait_for("destination.status", 3)
        assert {each["certificate_state"] for each in daemon.events("destination.status")} == {state}
        logged = {each["certificate_role"] for each in daemon.events("certificate.expiring")}
        assert logged == (set() if state == "valid" else {"client", "server"})
        done = stage.backupd("check")
        assert done.returncode == 0
        assert ("which expires at" in done.stdout + done.stderr) == (state != "valid")


@pytest.mark.long
def test_check_is_unknown_without_a_ledger_or_a_valid_configuration(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    code, line = checked(stage)
    assert (code, line.startswith("UNKNOWN - ")) == (3, True)
    assert "no ledger here yet" in line
    assert checked(stage, "--warning-age", "soon")[0] == 3
    stage.config.write_text("nonsense")
    assert checked(stage)[0] == 3


# list, show


@pytest.mark.long
def test_list_filters_by_drop_device_destination_time_and_name(
    stage: Stage, receiver: RunningReceiver
) -> None:
    pattern = """label_pattern = '(?P<site>[^/]+)/(?P<device>[^-]+)-.*'"""
    a_sent_archive(stage, receiver, "north/r1-a.cfg", "north/r2-a.cfg", "south/r1-b.bin", drop=pattern)
    change(stage, "UPDATE archive SET queued_at = ? WHERE id = 1", micros(timedelta(days=3)))

    def listed(*arguments: str) -> list[str]:
        done = stage.backupd("list", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return sorted(r["archive"]["relpath"] for r in json.loads(done.stdout))

    everything = ["north/r1-a.cfg", "north/r2-a.cfg", "south/r1-b.bin"]
    assert listed("--drop", "switches", "--destination", "vault", "--state", "delivered") == everything
    assert listed("--device", "r1") == ["north/r1-a.cfg", "south/r1-b.bin"]
    assert listed("--device", "r1", "--label", "site=south") == ["south/r1-b.bin"]
    assert listed("--name", "*.CFG") == ["north/r1-a.cfg", "north/r2-a.cfg"]
    assert listed("--name", "south/*") == ["south/r1-b.bin"]
    old = json.loads(stage.backupd("list", "--json", "--until", "2d").stdout)
    assert len(old) == 1
    assert len(listed("--since", "2d")) == 2
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert listed("--since", tomorrow) == []
    assert stage.backupd("list", "--name", "none").stdout == "no matching deliveries\n"
    for wrong in (
        ["--drop", "swiches"],
        ["--destination", "valt"],
        ["--since", "soon"],
        ["--label", "x"],
        ["--label", "rack=1"],
    ):
        done = stage.backupd("list", *wrong)
        assert (done.returncode, "hint: " in done.stderr) == (2, True)


@pytest.mark.long
def test_show_lists_all_deliveries_of_an_archive(stage: Stage, receiver: RunningReceiver) -> None:
    other = f'[destination.annex]\nurl = "{receiver.url}"\nca = "{stage.pki.ca_pem}"\n'
    other += f'cert = "{stage.pki.client_cert}"\nkey = "{stage.pki.client_key}"\n'
    a_sent_archive(stage, receiver, "one.cfg", more=other)
    [one, two] = json.loads(stage.backupd("list", "--json").stdout)
    number = one["archive"]["id"]
    story = json.loads(stage.backupd("show", f"@{number}", "--json").stdout)
    assert story["archive"]["disposed_to"] == "sent/one.cfg"
    assert [d["delivery"] for d in story["deliveries"]] == [one, two]
    assert all(len(d["attempts"]) == 1 for d in story["deliveries"])
    text = stage.backupd("show", f"@{number}").stdout
    for words in (
        f"archive      @{number} switches: one.cfg",
        one["id"],
        two["id"],
        "annex",
        "vault",
        "receipt",
    ):
        assert words in text
    by_delivery = json.loads(stage.backupd("show", two["id"], "--json").stdout)
    assert by_delivery["delivery"] == two
    assert [d["delivery"] for d in by_delivery["deliveries"]] == [two, one]
    for wrong in ("@", "@x", "@99"):
        assert stage.backupd("show", wrong).returncode == 2


# audit

ALL_OK = {"ok": 1, "missing": 0, "changed": 0, "unreadable": 0, "unknown": 0}


def audited(stage: Stage, *arguments: str) -> tuple[int, dict[str, dict[str, int]], list[dict[str, str]]]:
    done = stage.backupd("audit", "--json", *arguments)
    assert done.stderr == ""
    result = json.loads(done.stdout)
    return done.returncode, result["counts"], result["wrong"]


@pytest.mark.long
def test_audit_reports_missing_changed_unreadable_and_intact_files(
    stage: Stage, receiver: RunningReceiver
) -> None:
    daemon = a_sent_archive(stage, receiver, "a.cfg", "b/b.cfg", "c.cfg", "d.cfg", "e.cfg")
    assert (
        stage.backupd("audit").stdout
        == "kept in sent_dir: 5 ok, 0 missing, 0 changed, 0 unreadable, 0 unknown\n"
    )
    daemon.stop()
    for receipt in stage.sent.rglob("*.receipt.json"):  # sent three days ago
        at = (datetime.now(UTC) - timedelta(days=3)).isoformat()
        receipt.write_text(re.sub(r'"(queued|ended)_at": "[^"]+"', rf'"\1_at": "{at}"', receipt.read_text()))
    (stage.sent / "a.cfg").unlink()
    (stage.sent / "b" / "b.cfg").write_bytes(b"something else")
    (stage.sent / "c.cfg").unlink()
    (stage.sent / "c.cfg").symlink_to("d.cfg")
    receipt = stage.sent / "e.cfg.receipt.json"
    receipt.write_text(re.sub(r"sha256:[0-9a-f]{4}", "sha256:0000", receipt.read_text()))
    code, counts, wrong = audited(stage)
    assert code == 3
    assert counts == {"kept": {"ok": 1, "missing": 1, "changed": 2, "unreadable": 1, "unknown": 0}}
    assert {w["path"]: w["verdict"] for w in wrong} == {
        "sent/a.cfg": "missing",
        "sent/b/b.cfg": "changed",
        "sent/c.cfg": "unreadable",
        "sent/e.cfg": "changed",
    }
    text = stage.backupd("audit").stdout
    assert re.search(r"missing +[0-9a-f]{8} +switches +sent/a\.cfg", text)
    assert audited(stage, "--since", "1d")[0] == 0
    assert audited(stage, "--drop", "switches", "--since", "7d")[0] == 3


@pytest.mark.long
def test_audit_reports_a_file_with_an_invalid_receipt_file(stage: Stage, receiver: RunningReceiver) -> None:
    a_sent_archive(stage, receiver, "a.cfg").stop()
    receipt = stage.sent / "a.cfg.receipt.json"
    receipt.unlink()
    receipt.write_text("[" * 100_000)
    code, counts, [wrong] = audited(stage)
    assert (code, counts["kept"]["unknown"], wrong["path"]) == (3, 1, "sent/a.cfg")


def test_audit_reports_a_file_without_a_receipt_file_once_the_daemon_must_have_written_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.configure("https://127.0.0.1:9/")
    stage.sent.mkdir()
    (stage.sent / "a.cfg").write_bytes(b"abc")
    audit(config=stage.config)
    assert "0 unknown" in capsys.readouterr().out
    monkeypatch.setattr("backupd.cli.audit._DISPOSITION_TIME", timedelta(0))  # the file was moved now
    time.sleep(0.01)
    with pytest.raises(typer.Exit) as ended:
        audit(config=stage.config)
    assert ended.value.exit_code == 3
    assert "1 unknown" in capsys.readouterr().out


@pytest.mark.long
def test_audit_reports_a_sent_folder_that_is_missing_or_a_link(
    stage: Stage, receiver: RunningReceiver
) -> None:
    a_sent_archive(stage, receiver, "a.cfg").stop()
    stage.sent.rename(stage.base / "moved")

    code, counts, [wrong] = audited(stage)
    assert (code, counts["kept"]["missing"], wrong["path"]) == (3, 1, "sent")
    assert "mount it" in wrong["detail"]

    stage.sent.symlink_to(stage.base / "moved")
    code, counts, [wrong] = audited(stage)
    assert (code, counts["kept"]["unreadable"], wrong["path"]) == (3, 1, "sent")
    assert "links are not followed" in wrong["detail"]


def test_audit_of_a_drop_that_has_sent_nothing_is_green(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    audit(config=stage.config)


@pytest.mark.long
def test_audit_needs_no_ledger(stage: Stage, receiver: RunningReceiver) -> None:
    a_sent_archive(stage, receiver, "a.cfg").stop()
    for path in stage.state.iterdir():
        path.unlink()
    assert audited(stage)[:2] == (0, {"kept": ALL_OK})


@pytest.mark.long
def test_audit_ignores_archives_that_the_daemon_removed(stage: Stage, receiver: RunningReceiver) -> None:
    daemon = a_sent_archive(stage, receiver, "a.cfg", drop='keep_sent_for = "1s"')
    daemon.wait_for("archive.expired")
    daemon.stop()
    assert audited(stage)[:2] == (0, {"kept": {**ALL_OK, "ok": 0}})
    [record] = json.loads(stage.backupd("list", "--json").stdout)
    shown = stage.backupd("show", record["id"]).stdout
    assert re.search(r"^moved to +sent/a\.cfg \(no longer there\)$", shown, re.MULTILINE)


@pytest.mark.long
def test_audit_remote_reports_an_archive_that_the_destination_lost(
    stage: Stage, receiver: RunningReceiver
) -> None:
    query = f'query_url = "{receiver.url}/{{digest}}"'
    a_sent_archive(stage, receiver, "a.cfg", "b.cfg", destination=query)
    assert audited(stage, "--remote")[:2] == (
        0,
        {
            "kept": {**ALL_OK, "ok": 2},
            "vault": {**ALL_OK, "ok": 2},
        },
    )
    [lost] = [path for path in stage.stored() if path.read_bytes() == b"content of b.cfg"]
    lost.unlink()
    code, counts, wrong = audited(stage, "--remote")
    assert (code, counts["vault"]["missing"]) == (3, 1)
    assert [(w["path"], w["destination"]) for w in wrong] == [("b.cfg", "vault")]


@pytest.mark.long
def test_audit_remote_reports_a_destination_that_cannot_be_queried(
    stage: Stage, receiver: RunningReceiver
) -> None:
    a_sent_archive(stage, receiver, "a.cfg").stop()
    refused = stage.backupd("audit", "--remote")
    assert (refused.returncode, "query_url" in refused.stderr) == (2, True)
    stage.configure(receiver.url, destination='query_url = "https://127.0.0.1:9/{digest}"')
    code, counts, wrong = audited(stage, "--remote")
    assert (code, counts["vault"]["unreadable"]) == (3, 1)
    assert "Connection refused" in wrong[0]["detail"]


# a large ledger


@pytest.mark.long
def test_queries_scan_no_table_of_a_hundred_thousand_archives(stage: Stage) -> None:
    """Counts SQLite's steps, which do not depend on the load of the machine."""
    stage.configure("https://127.0.0.1:9/")
    stage.state.mkdir()
    connection = open_ledger(stage.state).connection
    count = 100_000
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO archive (id, drop_name, relpath, folder_id, inode, size, mtime_ns, ctime_ns,"
        " queued_at, state, disposition, moved_to, disposed_at, has_entry)"
        " VALUES (?, 'switches', ?, 1, ?, 3, 1, 1, ?, 'delivered', 'done', ?, ?, 0)",
        ((n, b"r%d.cfg" % n, n, n * 10**6, b"sent/r%d.cfg" % n, n * 10**6) for n in range(1, count + 1)),
    )
    connection.executemany(
        "INSERT INTO delivery (id, archive_id, destination, size, state, ended_at, digest, attempts)"
        " VALUES (?, ?, 'vault', 3, 'delivered', ?, 'sha256:00', 1)",
        ((f"{n:08x}-0000", n, n * 10**6) for n in range(1, count + 1)),
    )
    connection.execute("COMMIT")
    connection.close()
    script = """
import sqlite3, sys
from datetime import UTC, datetime
from backupd.core.model import DeliveryState
from backupd.ledger.history import Search, Selector
from backupd.ledger.sqlite.queries import LedgerQueries
from backupd.ledger.sqlite.state_queries import queue_state
connection = sqlite3.connect(sys.argv[1])
steps = [0]
def step():
    steps[0] += 1
connection.set_progress_handler(step, 100)
history = LedgerQueries(connection)
for ask in (
    lambda: history.device_days(["switches"], datetime.now(UTC)),
    lambda: history.throughput(["vault"], datetime.now(UTC)),
    lambda: queue_state(connection, ["switches"], ["vault"]),
    lambda: history.find(Search(selectors=[Selector("0000a000", 70_000)]), 50),
    lambda: history.archive(70_000),
    lambda: history.deliveries_of(70_000),
    lambda: history.find(Search(), 50),
    *(lambda state=state: history.find(Search(state), 50)
      for state in DeliveryState if state != "superseded"),
):
    ask()
print(steps[0] * 100)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(stage.state / "ledger.sqlite3")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 100_000  # one scan of all rows takes several times as many
    assert len(json.loads(stage.backupd("list", "--json", "--name", "r7.cfg").stdout)) == 1


@pytest.mark.long
def test_a_name_that_was_used_several_times_is_counted_once(stage: Stage) -> None:
    def refuses_bad_ones(peer: Peer) -> None:
        request = peer.read_request()
        peer.send(http_response(422) if request.archive.startswith(b"bad") else receipt_for(request.archive))

    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        for number, content in enumerate((b"bad 1", b"good 1", b"bad 2", b"good 2"), 1):
            stage.put("r1.cfg", content)
            daemon.wait_for("archive.disposed", number)
            folder = stage.rejected if content.startswith(b"bad") else stage.sent
            if number <= 2:
                (folder / "r1.cfg").unlink()
        assert json.loads(stage.backupd("status", "--json").stdout)["rejected"] == 1
        assert "1 archive rejected" in checked(stage)[1]
        assert daemon.stop() == 0
    audit = json.loads(stage.backupd("audit", "--json").stdout)
    assert audit["counts"]["kept"]["ok"] == 1
    assert audit["wrong"] == []
    (stage.sent / "r1.cfg").unlink()
    audit = json.loads(stage.backupd("audit", "--json").stdout)
    assert (audit["counts"]["kept"]["missing"], len(audit["wrong"])) == (1, 1)
    assert stage.backupd("retry", "--all").stdout.startswith("1 archive put back")
