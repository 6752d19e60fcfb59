"""The recorded state of the daemon: uploads under way, pauses by people, and a destination that is back."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
from typing import Any

import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.pki import Pki
from tests.scripted import Peer, ScriptedServer, http_response, server_context
from tests.stage import Stage, until
from tests.terminal import CTRL_C, Terminal

SHORT = 'retry = { initial = "100ms", max = "500ms" }'


def state(stage: Stage) -> dict[str, Any]:
    done = stage.backupd("status", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def destination(stage: Stage, name: str = "vault") -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {each["name"]: each for each in state(stage)["destinations"]}
    return found[name]


def tls_of(stage: Stage) -> ServerTls:
    return ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)


def test_an_upload_under_way_is_shown_with_its_progress(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, destination='bandwidth = "400KB/s"')
    stage.daemon().ready()
    stage.put("core-1.tar.gz", os.urandom(2_000_000))

    def progress() -> Any:
        return [each for each in state(stage)["uploads"] if each["sent_bytes"]]

    [upload] = until(progress, "an upload with progress")
    assert (upload["archive"], upload["destination"], upload["size_bytes"]) == (
        "core-1.tar.gz", "vault", 2_000_000,
    )  # fmt: skip
    assert 0 < upload["sent_bytes"] <= 2_000_000
    assert upload["bytes_per_s"] > 0
    text = until(lambda: "%" in (shown := stage.backupd("status").stdout) and shown, "the progress")
    assert "core-1.tar.gz" in text
    until(lambda: not state(stage)["uploads"], "the end of the upload")
    assert destination(stage)["last_delivered"]


def test_the_state_after_the_end_is_the_last_one(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", destination=SHORT)
    daemon = stage.daemon().ready()
    stage.put("sw.cfg", b"content")
    daemon.wait_for("destination.paused")
    assert daemon.stop() == 0
    found = state(stage)
    assert found["daemon_pid"] is None
    assert [each["pending"] for each in found["destinations"]] == [1]
    assert [each["pending"] for each in found["drops"]] == [1]
    assert found["level"] == "critical"
    assert "NOT RUNNING" in stage.backupd("status").stdout


@pytest.mark.long
def test_a_daemon_that_hangs_is_told_from_one_that_runs(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"')
    daemon = stage.daemon().ready()
    assert stage.backupd("status", "--check").returncode == 0
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        with sqlite3.connect(stage.state / "ledger.sqlite3") as ledger:  # as if minutes had passed
            row = ledger.execute("SELECT state FROM snapshot").fetchone()
            old = {**json.loads(row[0]), "taken_at": "2026-01-01T00:00:00Z"}
            ledger.execute("UPDATE snapshot SET state = ?", (json.dumps(old),))
        ledger.close()
        done = stage.backupd("status", "--check")
        assert (
            done.returncode,
            done.stdout.startswith("CRITICAL - the daemon hangs: its last state is"),
        ) == (
            2,
            True,
        )
        assert "HANGS" in stage.backupd("status").stdout
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    until(lambda: stage.backupd("status", "--check").returncode == 0, "the daemon to go on")


def test_a_refused_configuration_is_an_alarm_until_one_is_accepted(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    valid = stage.config.read_text()
    stage.config.write_text(valid + "\nnonsense = 1\n")
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.wait_for("config.refused")
    stage.config.write_text(valid)
    [alarm] = state(stage)["alarms"]
    assert (alarm["kind"], alarm["subject"], alarm["level"]) == ("daemon", "configuration", "warning")
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.wait_for("config.reloaded")
    assert state(stage)["alarms"] == []


# pauses by people


def test_a_paused_destination_gets_nothing_until_it_is_resumed(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    done = stage.backupd("pause", "vault", "--for", "2h", "--note", "new disks")
    assert done.returncode == 0, done.stderr
    stage.put("sw.cfg", b"content")  # at once: the command has waited for the daemon
    daemon.wait_for("destination.held", destination="vault", note="new disks")
    daemon.wait_for("archive.queued")
    assert destination(stage)["held"]["note"] == "new disks"
    check = stage.backupd("status", "--check")
    assert check.returncode == 0
    assert "vault is paused by" in check.stdout
    assert "new disks" in stage.backupd("status").stdout
    daemon.stop()

    daemon = stage.daemon().ready()
    daemon.wait_for("destination.held", destination="vault")
    assert daemon.events("archive.delivered") == []
    assert stage.backupd("resume", "vault").returncode == 0
    daemon.wait_for("destination.released", destination="vault")
    daemon.wait_for("archive.delivered")
    assert destination(stage)["held"] is None


def test_archives_of_a_paused_drop_wait_while_others_are_delivered(
    stage: Stage, receiver: RunningReceiver
) -> None:
    other = stage.base / "other"
    other.mkdir()
    stage.configure(receiver.url, more=f'[drop.routers]\npath = "{other}"\n')
    daemon = stage.daemon().ready()
    assert stage.backupd("pause", "switches").returncode == 0
    daemon.wait_for("drop.held", drop="switches")
    stage.put("held.cfg", b"content")
    daemon.wait_for("archive.queued", archive="held.cfg")
    stage.put("sent.cfg", b"other", into=other)
    daemon.wait_for("archive.delivered", archive="sent.cfg")
    found = state(stage)
    assert {each["name"]: each["pending"] for each in found["drops"]} == {"switches": 1, "routers": 0}
    [alarm] = found["alarms"]  # a pause without an end may be forgotten
    assert (alarm["kind"], alarm["level"]) == ("held", "warning")
    text = stage.backupd("status").stdout
    assert text.count("the drop switches is paused by") == 1
    assert "\n\n\n" not in text
    assert stage.backupd("resume", "switches").returncode == 0
    daemon.wait_for("archive.delivered", archive="held.cfg")


def test_a_held_destination_that_is_down_shows_no_time_of_a_retry(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", destination='retry = { initial = "1h", max = "1h" }')
    daemon = stage.daemon().ready()
    stage.put("sw.cfg", b"content")
    daemon.wait_for("destination.paused")

    def row_of_vault() -> str:
        lines = stage.backupd("status").stdout.splitlines()
        return next(line.rstrip() for line in lines if re.match(r"vault +(paused|held) ", line))

    until(lambda: re.search(r" in \d+ min$", row_of_vault()), "the time of the retry")
    assert stage.backupd("pause", "vault", "--for", "2h").returncode == 0
    until(lambda: " held " in row_of_vault(), "the pause")
    assert row_of_vault().endswith(" -")


def test_a_pause_ends_at_its_time(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    stage.backupd("pause", "vault", "--for", "3s")
    daemon.wait_for("destination.held")
    stage.put("sw.cfg", b"content")
    daemon.wait_for("destination.released")
    daemon.wait_for("archive.delivered")
    assert stage.backupd("resume", "vault").returncode == 2  # there is none any more


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pause", "nowhere"], "there is no destination or drop named nowhere"),
        (["pause", "vault", "--for", "soon"], "--for: expected a duration"),
        (["pause", "vault", "--for", "0s"], "--for: the pause would be over at once"),
        (["pause", "vault", "--for", "1ms"], "--for: the pause would be over at once"),
        (["pause", "--drop", "vault"], "there is no drop named vault"),
        (["pause", "vault", "--note", "x" * 201], "--note: 201 characters"),
        (["resume", "vault"], "nobody has paused vault"),
    ],
    ids=["unknown", "word", "zero", "moment", "kind", "note", "resume"],
)
def test_a_pause_that_cannot_be_is_refused(stage: Stage, arguments: list[str], words: str) -> None:
    stage.configure("https://127.0.0.1:9/")
    stage.daemon().ready().stop()
    done = stage.backupd(*arguments)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


# a destination that is back


def test_a_destination_that_is_back_is_noticed_without_an_archive(stage: Stage) -> None:
    port = stage.a_free_port()
    stage.configure(f"https://127.0.0.1:{port}/upload", destination=SHORT, drop='rescan_every = "1s"')
    daemon = stage.daemon().ready()
    archive = stage.put("sw.cfg", b"content")
    daemon.wait_for("destination.paused")
    archive.unlink()
    daemon.wait_for("archive.missing")
    assert destination(stage)["circuit"] != "working"
    with RunningReceiver(stage.store, tls_of(stage), port=port):
        daemon.wait_for("destination.resumed")
        assert destination(stage)["circuit"] == "working"
    assert stage.stored() == []


def test_a_probe_that_fails_keeps_the_destination_paused(stage: Stage) -> None:
    """Its certificate is refused: the server is up, and takes no archive."""
    port = stage.a_free_port()
    other = Pki(stage.base / "other-pki")
    untrusted = ServerTls(other.server_cert, other.server_key, other.ca_pem)
    stage.configure(
        f"https://127.0.0.1:{port}/upload",
        destination=SHORT,
        drop='rescan_every = "1s"',
        top='heartbeat_every = "1s"',
    )
    daemon = stage.daemon().ready()
    archive = stage.put("sw.cfg", b"content")
    daemon.wait_for("destination.paused")
    archive.unlink()
    daemon.wait_for("archive.missing")
    with RunningReceiver(stage.store, untrusted, port=port):
        daemon.wait_for("destination.paused", reason="tls_failed")
        assert destination(stage)["circuit"] != "working"
        assert daemon.stop() == 0  # at once, also during a probe


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_answers_for_a_server_that_is_down_keeps_the_destination_paused(
    stage: Stage, status: int
) -> None:
    methods = []

    def respond(peer: Peer) -> None:
        methods.append(peer.read_head().split()[0])
        peer.send(http_response(status))

    with ScriptedServer(respond, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=SHORT, drop='rescan_every = "1s"')
        daemon = stage.daemon().ready()
        archive = stage.put("sw.cfg", b"content")
        daemon.wait_for("destination.paused")
        archive.unlink()
        daemon.wait_for("archive.missing")
        until(lambda: methods.count(b"OPTIONS") > 2 or daemon.events("destination.resumed"), "a second probe")
        assert daemon.events("destination.resumed") == []


# the status on a narrow terminal


def test_the_status_fits_eighty_columns_without_folded_words(stage: Stage, receiver: RunningReceiver) -> None:
    name = "running-config-of-the-core-switch-in-the-second-data-centre-2026-11-22T030000.tar.gz"
    stage.configure(
        receiver.url,
        destination='bandwidth = "100KB/s"',
        drop='include = ["*.gz"]',
        more=stage.annex("https://127.0.0.1:9/upload"),
    )
    daemon = stage.daemon().ready()
    stage.put("notes.pdf", b"x")
    stage.put(name, os.urandom(2_000_000))
    daemon.wait_for("destination.paused", destination="annex")
    until(lambda: state(stage)["uploads"], "the upload")
    with Terminal(stage, ["status"], columns=80) as terminal:
        assert terminal.wait() == 0
        lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text).splitlines()
    for line in lines:
        assert len(line.rstrip()) <= 80 or len(line.split()) == 1, line  # a path without blanks stays whole
    words = " ".join(lines).split()
    assert any("…" in word for word in words)
    for word in ("included", "connect_failed:", "inotify", "destination", "rejected", "`include`"):
        assert word in words, word


def test_watch_goes_on_while_the_ledger_cannot_be_read(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    with Terminal(stage, ["status", "--watch"]) as terminal:  # before the first start of the daemon
        terminal.until(lambda: "no ledger here yet" in terminal.text, "the error")
        stage.daemon().ready()
        terminal.until(lambda: "running for" in terminal.text, "the state")
        terminal.press(CTRL_C)
        assert terminal.wait() == 0


# the width and height of a terminal


def test_a_low_terminal_shows_the_begin_of_the_status_and_how_much_is_missing(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", destination=SHORT)
    daemon = stage.daemon().ready()
    stage.put("sw.cfg", b"content")
    daemon.wait_for("destination.paused")
    with Terminal(stage, ["status", "--watch"], lines=10) as terminal:
        terminal.until(lambda: "more lines" in terminal.display[8], "the last line")
        terminal.until(
            lambda: terminal.display[1].startswith("WARNING: vault has been paused"), "the worst at the top"
        )
        assert terminal.display[0].startswith("backupd ")
        assert terminal.display[9] == ""
        terminal.press(CTRL_C)
        assert terminal.wait() == 0


def test_the_line_of_the_monitoring_plugin_is_one_line_on_a_narrow_terminal(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    stage.daemon().ready()
    with Terminal(stage, ["status", "--check"], columns=40) as terminal:
        assert terminal.wait() == 0
        assert terminal.text.count("\n") == 1


def test_show_lists_attempts_with_the_same_error_once(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", destination=SHORT)
    daemon = stage.daemon().ready()
    stage.put("sw.cfg", b"content")
    daemon.wait_for("attempt.failed", count=3)
    daemon.stop()
    with Terminal(stage, ["show", "sw.cfg"], lines=60) as terminal:
        assert terminal.wait() == 0
        [line] = [line for line in terminal.display if "connect_failed:" in line]
    assert re.match(r"attempts 1-\d+: connect_failed: Connection refused", line)
