"""The commands list, show, retry and audit find archives by id, number, name, path and digest."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.scripted import Peer, ScriptedServer, receipt_for, server_context
from tests.stage import Stage, a_stage, until
from tests.terminal import Terminal

CONTENT = b"content of north/core.cfg"


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """An installation that has delivered an archive twice under the same name, and two others."""
    for stage in a_stage(tmp_path_factory.mktemp("sent")):
        tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
        with RunningReceiver(stage.store, tls) as receiver:
            stage.configure(receiver.url)
            daemon = stage.daemon().ready()
            (stage.drop / "north").mkdir()
            (stage.drop / "south").mkdir()
            contents = {"edge.cfg": b"one", "north/core.cfg": CONTENT, "south/core.cfg": b"three"}
            for number, (path, content) in enumerate(contents.items(), 1):
                stage.put(Path(path).name, content, into=(stage.drop / path).parent)
                daemon.wait_for("archive.disposed", number)
            stage.put("edge.cfg", b"four")
            daemon.wait_for("archive.disposed", 4)
            assert daemon.stop() == 0
        yield stage


def listed(stage: Stage, *arguments: str) -> list[dict[str, Any]]:
    done = stage.backupd("list", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return list(json.loads(done.stdout))


def paths(records: Sequence[dict[str, Any]]) -> list[str]:
    return [record["archive"]["relpath"] for record in records]


def test_list_takes_ids_numbers_names_paths_and_digests(sent: Stage) -> None:
    newest, south, north, oldest = listed(sent)
    digest = hashlib.sha256(CONTENT).hexdigest()
    for arguments, expected in (
        ([north["id"]], [north]),
        ([north["id"][:12].upper()], [north]),
        ([f"@{north['archive']['id']}", "edge.cfg"], [newest, north, oldest]),
        (["core.cfg"], [south, north]),
        (["north/core.cfg"], [north]),
        ([f"{sent.drop}/north/core.cfg"], [north]),
        ([f"{sent.sent}/north/core.cfg"], [north]),
        ([digest[:8]], [north]),
        ([f"sha256:{digest}".upper()], [north]),
        (["core.cfg", "--name", "south/*"], [south]),
        (["cfg"], []),
    ):
        assert listed(sent, *arguments) == expected, arguments


def test_show_takes_the_newest_archive_of_a_file_and_counts_the_older_ones(sent: Stage) -> None:
    newest, _, north, oldest = listed(sent)
    shown, digest = sent.backupd("show", "edge.cfg"), north["digest"]

    assert newest["id"] in shown.stdout
    assert oldest["id"] not in shown.stdout
    assert shown.stdout.endswith("\nthis is the newest; `backupd list edge.cfg` shows 1 older archive\n")
    printed = json.loads(sent.backupd("show", "--json", digest[:20]).stdout)
    assert [each["delivery"]["id"] for each in printed["deliveries"]] == [north["id"]]


@pytest.mark.parametrize("command", ["show", "retry"])
def test_a_name_of_several_files_lists_them_with_state_and_time(sent: Stage, command: str) -> None:
    done = sent.backupd(command, "core.cfg", environ={"TZ": "Europe/Berlin"})
    _, south, north, _ = listed(sent)

    assert (done.returncode, done.stdout) == (2, "")
    first, *candidates, hint = done.stderr.splitlines()
    assert first == "backupd: 'core.cfg' matches several deliveries:"
    assert hint == "  hint: give the id of one of them"
    for line, record in zip(candidates, (south, north), strict=True):
        assert line.startswith(f"  {record['id'][:8]}  20")
        assert line.endswith(f"CET  delivered   switches: {record['archive']['relpath']} → vault")


def test_what_matches_nothing_ends_with_2(sent: Stage) -> None:
    for wrong, words in (
        ("none.cfg", "no delivery matches 'none.cfg'"),
        ("@x", "expected @ and the number"),
        ("@99", "no delivery matches '@99'"),
        ("/etc/passwd", f"/etc/passwd: it is not in a drop folder\n  hint: there are: {sent.drop}"),
    ):
        done = sent.backupd("show", wrong)
        assert done.returncode == 2
        assert words in done.stderr


def test_audit_takes_ids_numbers_names_paths_and_digests(sent: Stage) -> None:
    newest, _, north, _ = listed(sent)
    digest = hashlib.sha256(CONTENT).hexdigest()
    for arguments, count in (
        ([north["id"][:12]], 1),
        ([f"@{north['archive']['id']}"], 1),
        (["core.cfg"], 2),
        (["edge.cfg"], 2),  # the second one has a time in its name
        ([newest["disposed_to"]], 1),
        ([f"{sent.sent}/north/core.cfg", digest[:8]], 1),
    ):
        done = sent.backupd("audit", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["counts"]["kept"]["ok"] == count, arguments
    nothing = sent.backupd("audit", "none.cfg")
    assert nothing.returncode == 2
    assert "nothing in sent_dir matches none.cfg" in nothing.stderr


def as_csv(stage: Stage, *arguments: str) -> list[dict[str, str]]:
    """Return the records of `list --csv`, each of which is one line."""
    command = [sys.executable, "-m", "backupd", "list", "--csv", "--config", str(stage.config), *arguments]
    text = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    records = list(csv.DictReader(io.StringIO(text, newline="")))
    assert text.count("\r\n") == len(text.splitlines()) == len(records) + 1
    return records


def test_list_prints_csv_with_the_values_of_json(sent: Stage) -> None:
    records = listed(sent)
    rows = as_csv(sent)

    assert [row["path"] for row in rows] == paths(records)
    for row, record in zip(rows, records, strict=True):
        assert (row["id"], row["state"], row["digest"]) == (record["id"], "delivered", record["digest"])
        assert (row["queued_at"], row["ended_at"]) == (record["archive"]["queued_at"], record["ended_at"])
        assert row["queued_at"].endswith("Z")
        assert (row["verified"], row["reason"], row["due_at"]) == ("true", "", "")
        assert row["size_bytes"] == str(record["archive"]["fingerprint"]["size"])
    assert sent.backupd("list", "--csv", "--json").returncode == 2


@pytest.mark.long
def test_csv_has_no_formulas_and_one_line_for_each_record(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", drop="inspect = 'off'")
    names = ("=cmd|' calc'!A0", "+1.cfg", "-1.cfg", "@a.cfg", 'a,"b"\n\x1b[2J.cfg', "plain.cfg")
    daemon = stage.daemon().ready()
    for name in (*names, "empty.cfg"):
        stage.put(name, b"" if name == "empty.cfg" else b"content")
    daemon.wait_for("archive.queued", len(names))
    until(lambda: "empty.cfg" in stage.backupd("list", "--problems").stdout, "the problem of the empty file")
    assert daemon.stop() == 0

    expected = {f"'{name}" for name in names[:4]} | {r'a,"b"\n\x1b[2J.cfg', "plain.cfg"}
    assert {row["path"] for row in as_csv(stage)} == expected
    [problem] = as_csv(stage, "--problems")
    assert (problem["path"], problem["size_bytes"]) == ("empty.cfg", "0")
    assert problem["since"].endswith("Z")
    assert problem["hint"]


def refuses_bad_ones(peer: Peer) -> None:
    while True:
        request = peer.read_request()
        peer.send(receipt_for(request.archive, 422 if request.archive.startswith(b"bad") else 201))


@pytest.mark.long
def test_a_retried_archive_is_listed_as_retried(stage: Stage) -> None:
    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        stage.put("sw.cfg", b"bad")
        daemon.wait_for("archive.disposed")
        [rejected] = listed(stage, "--state", "rejected")
        again = stage.backupd("retry", "sw.cfg")
        assert (again.returncode, again.stdout) == (
            0, "sw.cfg was put back into the drop folder; it is queued again\n"
        )  # fmt: skip
        daemon.wait_for("archive.disposed", 2)
        assert daemon.stop() == 0

    newest, oldest = listed(stage)
    assert (newest["state"], oldest["state"], oldest["id"]) == ("rejected", "retried", rejected["id"])
    assert listed(stage, "--state", "rejected") == [newest]
    assert listed(stage, "--state", "retried") == [oldest]
    assert json.loads(stage.backupd("status", "--json").stdout)["rejected"] == 1
    shown = stage.backupd("show", oldest["id"]).stdout
    assert "state        retried\n" in shown
    assert "reason       archive_refused\n" in shown  # the history stays
    refused = stage.backupd("retry", oldest["id"])
    assert refused.returncode == 2
    assert "it was put back already" in refused.stderr
    assert "`backupd show sw.cfg`" in refused.stderr


@pytest.mark.long
def test_retry_takes_the_newest_rejected_archive_of_a_name_although_a_newer_one_is_delivered(
    stage: Stage,
) -> None:
    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        for number, content in enumerate((b"bad 1", b"bad 2", b"good"), 1):
            stage.put("sw.cfg", content)
            daemon.wait_for("archive.disposed", number)
        assert daemon.stop() == 0
    assert stage.backupd("retry", str(stage.drop / "sw.cfg")).returncode == 0
    assert (stage.drop / "sw.cfg").read_bytes() == b"bad 2"


@pytest.mark.long
def test_retry_all_is_limited_to_a_drop_and_to_a_destination(stage: Stage) -> None:
    other = stage.base / "firewalls"
    other.mkdir()
    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        more = f'[drop.firewalls]\npath = "{other}"\nstable_for = "0.1s"\n'
        stage.configure(server.url, more=more + stage.annex(server.url))
        daemon = stage.daemon().ready()
        stage.put("sw.cfg", b"bad")
        stage.put("fw.cfg", b"bad", into=other)
        daemon.wait_for("archive.disposed", 2)
        assert daemon.stop() == 0
    for wrong in (["sw.cfg", "--drop", "switches"], ["--all", "--drop", "none"], ["--drop", "switches"]):
        assert stage.backupd("retry", *wrong).returncode == 2
    assert stage.backupd("retry", "--all", "--drop", "firewalls").stdout.startswith("1 archive put back")
    assert (other / "fw.cfg").exists()
    assert not (stage.drop / "sw.cfg").exists()
    assert stage.backupd("retry", "--all", "--destination", "annex").stdout.startswith("1 archive put back")
    assert (stage.drop / "sw.cfg").exists()


@pytest.mark.long
def test_tables_fit_80_columns_with_whole_ids_and_shortened_paths(stage: Stage) -> None:
    name = f"core-switch-{'x' * 70}.tar.gz"
    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        stage.put(name, b"bad")
        stage.put("y.cfg", b"good")
        daemon.wait_for("archive.disposed", 2)
        assert daemon.stop() == 0
    records = {record["archive"]["relpath"]: record for record in listed(stage)}
    bad, good = records[name]["id"][:8], records["y.cfg"]["id"][:8]
    os.truncate(stage.sent / "y.cfg", 1)
    screens = {}
    for command in (["list"], ["show", bad], ["audit"]):
        with Terminal(stage, command, environ={"TZ": "Asia/Kolkata"}) as terminal:
            terminal.wait()
            screens[command[0]] = terminal.display

    by_id = {line[:8]: line for line in screens["list"]}
    assert by_id[bad].split()[1:3] == ["rejected", "switches"]
    assert "core-" in by_id[bad]
    assert ".gz" in by_id[bad]
    assert by_id[bad].count("…") == 1
    assert "y.cfg " in by_id[good]
    assert f"archive_refused: {bad}" in screens["list"]
    attempt = next(line for line in screens["show"] if line.startswith("1 "))
    assert " IST " in attempt
    assert attempt.endswith(" rejected  422")
    assert any(line.startswith("attempt 1: archive_refused: 422") for line in screens["show"])
    finding = next(line for line in screens["audit"] if line.startswith("changed"))
    assert good in finding
    assert "y.cfg: it has 1 bytes, 4 were delivered" in "\n".join(screens["audit"])
    plain = stage.backupd("list").stdout
    assert name in plain
    assert "archive_refused" in next(line for line in plain.splitlines() if line.startswith(bad))
