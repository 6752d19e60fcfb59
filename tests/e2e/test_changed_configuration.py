"""A changed configuration loses no archive and sends none again, by a reload as well as by a restart."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.scripted import (
    Peer,
    ScriptedServer,
    accept_all,
    http_response,
    in_turn,
    receipt_for,
    server_context,
)
from tests.stage import Daemon, Stage, until

ApplyChange = Callable[[Stage, Daemon], Daemon]


def restart(stage: Stage, daemon: Daemon) -> Daemon:
    assert daemon.stop() == 0
    return stage.daemon().ready()


def reload(stage: Stage, daemon: Daemon) -> Daemon:
    before = len(daemon.events("config.reloaded"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("config.reloaded", before + 1)
    return daemon


both_ways = pytest.mark.parametrize("apply_change", [restart, reload])


def refuses(peer: Peer) -> None:
    peer.read_request()
    peer.send(http_response(422))


def refuses_bad_ones(peer: Peer) -> None:
    request = peer.read_request()
    peer.send(http_response(422) if request.archive.startswith(b"bad") else receipt_for(request.archive))


def wait_for_scans(daemon: Daemon, number: int = 2) -> None:
    """Wait until so many more scans have ended."""
    scans = len(daemon.events("drop.scanned"))
    daemon.wait_for("drop.scanned", scans + number)


def problems_of(stage: Stage) -> list[dict[str, Any]]:
    return json.loads(stage.backupd("list", "--problems", "--json").stdout)  # type: ignore[no-any-return]


@pytest.mark.long
@both_ways
def test_archives_in_the_earlier_sent_and_rejected_folders_are_not_sent_again(
    stage: Stage, apply_change: ApplyChange
) -> None:
    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1s"', top='log.level = "debug"')
        (stage.drop / "core").mkdir()
        daemon = stage.daemon().ready()
        stage.put("good.cfg", b"good")
        stage.put("core/deep.cfg", b"deep")
        stage.put("worse.cfg", b"bad")
        daemon.wait_for("archive.disposed", 3)
        requests = len(server.requests)

        folders = 'sent_dir = "done"\nrejected_dir = "refused"\n'
        stage.configure(server.url, drop=folders + 'rescan_every = "1s"', top='log.level = "debug"')
        daemon = apply_change(stage, daemon)
        daemon.wait_for("archive.ignored", 2, reason="earlier_folder")
        wait_for_scans(daemon)
        stage.put("next.cfg", b"good, too")
        daemon.wait_for("archive.disposed", archive="next.cfg")

        assert len(server.requests) == requests + 1
        assert (stage.drop / "sent" / "core" / "deep.cfg").exists()
        assert {each["relpath"] for each in problems_of(stage)} == {"sent", "rejected"}
        check = stage.backupd("check", "--offline")
        assert check.returncode == 0
        assert f"{stage.sent}/ {stage.drop}/done/" in check.stdout
        assert f"{stage.rejected}/ {stage.drop}/refused/" in check.stdout

        stage.sent.rename(stage.base / "away")
        until(lambda: {each["relpath"] for each in problems_of(stage)} == {"rejected"}, "the problem to end")
        assert daemon.stop() == 0


@pytest.mark.long
def test_a_sent_folder_that_is_moved_into_a_drop_folder_is_not_sent(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='rescan_every = "1h"')
    daemon = stage.daemon().ready()
    stage.put("a.cfg", b"abc")
    daemon.wait_for("archive.disposed")
    stage.sent.rename(stage.base / "copy")
    (stage.base / "copy").rename(stage.drop / "copy")
    (ignored,) = daemon.wait_for("archive.ignored", reason="earlier_folder")
    assert ignored["archive"] == "copy"
    stage.put("b.cfg", b"def", into=stage.drop / "copy")
    stage.put("c.cfg", b"ghi")
    daemon.wait_for("archive.disposed", archive="c.cfg")
    assert len(stage.stored()) == 2
    assert daemon.stop() == 0


@pytest.mark.long
def test_archives_that_are_moved_back_with_their_reason_files_are_sent(stage: Stage) -> None:
    """An earlier folder is one with receipt files of archives from another place."""
    with ScriptedServer(in_turn(refuses, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1s"')
        (stage.drop / "core").mkdir()
        daemon = stage.daemon().ready()
        stage.put("core/a.cfg", b"abc")
        daemon.wait_for("archive.rejected")
        daemon.wait_for("archive.disposed")
        (stage.drop / "core").rmdir()
        (stage.rejected / "core").rename(stage.drop / "core")
        daemon.wait_for("archive.delivered", archive="core/a.cfg")
        assert daemon.stop() == 0


@pytest.mark.long
def test_retry_finds_a_rejected_archive_in_the_renamed_folder(stage: Stage) -> None:
    with ScriptedServer(refuses, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        stage.put("a.cfg", b"abc")
        daemon.wait_for("archive.disposed")
        assert daemon.stop() == 0
    stage.rejected.rename(stage.drop / "refused")
    stage.configure(server.url, drop='rejected_dir = "refused"')
    done = stage.backupd("retry", "--all")
    assert done.stdout.startswith("1 archive put back")
    assert (stage.drop / "a.cfg").read_bytes() == b"abc"
    assert list((stage.drop / "refused").iterdir()) == []


QUICK_RETRY = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"\n'


def deliveries(stage: Stage) -> list[tuple[str, str, str]]:
    """Return the id, the drop and the state of each delivery in the ledger."""
    found = json.loads(stage.backupd("list", "--json").stdout)
    return sorted((each["id"], each["archive"]["drop"], each["state"]) for each in found)


def rename_drop(stage: Stage, name: str) -> None:
    stage.config.write_text(stage.config.read_text().replace("[drop.switches]", f"[drop.{name}]"))


@pytest.mark.long
@both_ways
def test_pending_and_delivered_archives_follow_a_renamed_drop(
    stage: Stage, receiver: RunningReceiver, apply_change: ApplyChange
) -> None:
    options = {
        "drop": 'on_delivered = "keep"\nrescan_every = "1s"',
        "more": QUICK_RETRY,
        "top": 'log.level = "debug"',
    }
    stage.configure(receiver.url, **options)
    daemon = stage.daemon().ready()
    stage.put("delivered.cfg", b"abc")
    daemon.wait_for("archive.disposed")
    stage.configure("https://127.0.0.1:1/v1/upload", **options)
    reload(stage, daemon)
    stage.put("pending.cfg", b"def")
    daemon.wait_for("archive.queued", 2)
    daemon.wait_for("destination.paused")
    before = deliveries(stage)

    rename_drop(stage, "routers")
    daemon = apply_change(stage, daemon)
    assert [(i, d) for i, d, _ in deliveries(stage)] == [(i, "routers") for i, _, _ in before]
    stage.configure(receiver.url, **options)
    rename_drop(stage, "routers")
    daemon = apply_change(stage, daemon)
    daemon.wait_for("archive.disposed", drop="routers", archive="pending.cfg")
    wait_for_scans(daemon)

    assert deliveries(stage) == sorted((i, "routers", "delivered") for i, _, _ in before)
    assert len(stage.stored()) == 2
    assert not problems_of(stage)
    assert "archive.missing" not in daemon.text()
    assert "drop.failed" not in stage.log.read_text()
    assert daemon.stop() == 0


@pytest.mark.long
@both_ways
def test_archives_follow_their_folders_if_two_drops_swap_their_names(
    stage: Stage, receiver: RunningReceiver, apply_change: ApplyChange
) -> None:
    other = stage.base / "other"
    other.mkdir()
    with_other = QUICK_RETRY + f'[drop.routers]\npath = "{other}"\nstable_for = "0.1s"\n'
    stage.configure("https://127.0.0.1:1/v1/upload", more=with_other)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"in the drop of switches")
    stage.put("r1.cfg", b"in the drop of routers", into=other)
    daemon.wait_for("archive.queued", 2)
    daemon.wait_for("destination.paused")
    before = deliveries(stage)

    stage.configure(receiver.url, more=with_other)
    text = stage.config.read_text().replace("[drop.switches]", "[drop.new]")
    text = text.replace("[drop.routers]", "[drop.switches]").replace("[drop.new]", "[drop.routers]")
    stage.config.write_text(text)
    daemon = apply_change(stage, daemon)
    daemon.wait_for("archive.disposed", 2, disposition="moved")

    names = {"switches": "routers", "routers": "switches"}
    assert deliveries(stage) == sorted((i, names[d], "delivered") for i, d, _ in before)
    assert (stage.sent / "r1.cfg").read_bytes() == b"in the drop of switches"
    assert (other / "sent" / "r1.cfg").read_bytes() == b"in the drop of routers"
    assert daemon.stop() == 0


@pytest.mark.long
@both_ways
def test_archives_that_are_pending_in_the_earlier_folder_of_a_drop_are_delivered_from_there(
    stage: Stage, receiver: RunningReceiver, apply_change: ApplyChange
) -> None:
    stage.configure("https://127.0.0.1:1/v1/upload", more=QUICK_RETRY, top='heartbeat_every = "1s"')
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"old")
    daemon.wait_for("archive.queued")
    daemon.wait_for("destination.paused")
    before = deliveries(stage)

    new = stage.base / "new"
    new.mkdir()
    stage.put("r1.cfg", b"new", into=new)
    text = stage.config.read_text().replace(f'path = "{stage.drop}"', f'path = "{new}"')
    stage.config.write_text(text)
    daemon = apply_change(stage, daemon)
    daemon.wait_for("archive.queued", 1 if apply_change is restart else 2)
    daemon.wait_for("drop.problem", reason="not_configured")
    left = f"switches:{stage.drop}"
    assert [each["drop"] for each in problems_of(stage)] == [left]
    assert sorted(d for _, d, _ in deliveries(stage)) == ["switches", left]
    # an attempt may be going on
    assert {i: s for i, _, s in deliveries(stage)}[before[0][0]] in ("pending", "claimed")
    status = json.loads(stage.backupd("status", "--json").stdout)
    assert {d["name"]: d["pending"] for d in status["drops"]} == {"switches": 1, left: 1}
    assert len(json.loads(stage.backupd("list", "--drop", left, "--json").stdout)) == 1

    stage.config.write_text(text.replace("https://127.0.0.1:1/v1/upload", receiver.url))
    daemon = apply_change(stage, daemon)
    daemon.wait_for("archive.disposed", 2, disposition="moved")
    daemon.wait_for("drop.problem_solved", reason="not_configured")
    assert (stage.sent / "r1.cfg").read_bytes() == b"old"
    assert (new / "sent" / "r1.cfg").read_bytes() == b"new"
    assert len(stage.stored()) == 2
    assert "archive.missing" not in stage.log.read_text()
    assert "archive.superseded" not in stage.log.read_text()
    assert daemon.stop() == 0


@pytest.mark.long
@both_ways
def test_archives_are_delivered_from_the_folder_that_a_link_led_to_when_they_were_queued(
    stage: Stage, receiver: RunningReceiver, apply_change: ApplyChange
) -> None:
    link, new = stage.base / "link", stage.base / "new"
    link.symlink_to(stage.drop)
    new.mkdir()
    stage.put("other.cfg", b"in the new folder", into=new)
    stage.configure("https://127.0.0.1:1/v1/upload", more=QUICK_RETRY, top='heartbeat_every = "1s"')
    text = stage.config.read_text().replace(f'path = "{stage.drop}"', f'path = "{link}"')
    stage.config.write_text(text)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"in the old folder")
    daemon.wait_for("archive.queued")
    daemon.wait_for("destination.paused")

    link.unlink()
    link.symlink_to(new)
    daemon = apply_change(stage, daemon)
    daemon.wait_for("archive.queued", archive="other.cfg")
    (problem, *_) = daemon.wait_for("drop.problem", reason="not_configured")
    assert str(stage.drop) in problem["error"]
    stage.config.write_text(text.replace("https://127.0.0.1:1/v1/upload", receiver.url))
    reload(stage, daemon)
    daemon.wait_for("archive.disposed", 2, disposition="moved")

    assert (stage.sent / "r1.cfg").exists()
    assert (new / "sent" / "other.cfg").exists()
    assert "archive.missing" not in stage.log.read_text()
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_folder_that_is_moved_to_another_filesystem_with_its_archives_is_delivered_once(
    stage: Stage, receiver: RunningReceiver
) -> None:
    """A copy has the size and the modification time of the archive, but another inode."""
    stage.configure("https://127.0.0.1:1/v1/upload", more=QUICK_RETRY)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"content")
    daemon.wait_for("archive.queued")
    daemon.wait_for("destination.paused")
    before = deliveries(stage)
    assert daemon.stop() == 0

    new = stage.base / "new"
    shutil.copytree(stage.drop, new)
    shutil.rmtree(stage.drop)
    stage.configure(receiver.url, more=QUICK_RETRY)
    stage.config.write_text(stage.config.read_text().replace(f'path = "{stage.drop}"', f'path = "{new}"'))
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.disposed", disposition="moved")

    assert deliveries(stage) == [(before[0][0], "switches", "delivered")]
    assert (new / "sent" / "r1.cfg").exists()
    assert "archive.missing" not in stage.log.read_text()
    assert daemon.stop() == 0


@pytest.mark.long
@both_ways
def test_archives_of_a_removed_drop_are_a_problem_until_a_drop_has_their_folder(
    stage: Stage, receiver: RunningReceiver, apply_change: ApplyChange
) -> None:
    other = stage.base / "other"
    other.mkdir()
    frequent = 'heartbeat_every = "1s"'
    with_other = QUICK_RETRY + f'[drop.routers]\npath = "{other}"\nstable_for = "0.1s"\n'
    stage.configure("https://127.0.0.1:1/v1/upload", more=with_other, top=frequent)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"content", into=other)
    daemon.wait_for("archive.queued")
    daemon.wait_for("destination.paused")

    stage.configure("https://127.0.0.1:1/v1/upload", more=QUICK_RETRY, top=frequent)
    daemon = apply_change(stage, daemon)
    (problem, *_) = daemon.wait_for("drop.problem", reason="not_configured")
    assert (problem["drop"], problem["problems"]) == ("routers", 1)
    assert str(other) in problem["error"]
    assert stage.backupd("status", "--check").returncode == 1

    stage.configure(receiver.url, more=with_other.replace("[drop.routers]", "[drop.last]"), top=frequent)
    daemon = apply_change(stage, daemon)
    daemon.wait_for("archive.disposed", drop="last", disposition="moved")
    daemon.wait_for("drop.problem_solved", drop="routers", reason="not_configured")
    assert daemon.stop() == 0


@pytest.mark.long
def test_forget_gives_up_what_is_pending_for_a_removed_destination(
    stage: Stage, receiver: RunningReceiver
) -> None:
    frequent = 'heartbeat_every = "1s"'
    stage.configure(receiver.url, more=stage.annex("https://127.0.0.1:1/v1/upload"), top=frequent)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"content")
    daemon.wait_for("delivery.verified")
    daemon.wait_for("destination.paused", destination="annex")
    refused = stage.backupd("forget", "--destination", "annex")
    assert refused.returncode == 2
    assert "is configured" in refused.stderr

    stage.configure(receiver.url, top=frequent)
    reload(stage, daemon)
    (warning,) = daemon.wait_for("config.warning", path="destination.annex")
    assert "`backupd forget --destination annex`" in warning["hint"]
    (problem, *_) = daemon.wait_for("drop.problem", drop="destination:annex", reason="not_configured")
    assert problem["problems"] == 1
    assert "`backupd forget --destination annex`" in problem["hint"]
    assert [each["drop"] for each in problems_of(stage)] == ["destination:annex"]
    assert stage.backupd("status", "--check").returncode == 1
    until(
        lambda: "annex" in stage.backupd("list", "--destination", "annex").stdout, "the delivery to be listed"
    )
    done = stage.backupd("forget", "--destination", "annex")
    assert done.stdout.startswith("annex: 1 pending delivery given up")

    daemon.wait_for("archive.disposed", disposition="moved")
    daemon.wait_for("drop.problem_solved", drop="destination:annex", reason="not_configured")
    assert len(stage.stored()) == 1
    assert not json.loads(stage.backupd("list", "--state", "pending", "--json").stdout)
    assert "nothing is pending" in stage.backupd("forget", "--destination", "annex").stderr
    assert daemon.stop() == 0


@pytest.mark.long
def test_forget_gives_up_what_is_pending_for_a_removed_drop(stage: Stage) -> None:
    other = stage.base / "other"
    other.mkdir()
    stage.configure(
        "https://127.0.0.1:1/v1/upload", more=f'[drop.routers]\npath = "{other}"\nstable_for = "0.1s"\n'
    )
    daemon = stage.daemon().ready()
    archive = stage.put("r1.cfg", b"content", into=other)
    daemon.wait_for("archive.queued")
    assert daemon.stop() == 0
    stage.configure("https://127.0.0.1:1/v1/upload")
    assert len(json.loads(stage.backupd("list", "--drop", "routers", "--json").stdout)) == 1
    assert stage.backupd("forget", "--drop", "routers").stdout.startswith("routers: 1 pending delivery")
    assert archive.exists()
    assert "there are: switches" in stage.backupd("list", "--drop", "routers").stderr
    for wrong in ([], ["sw1", "--destination", "annex"]):
        assert stage.backupd("forget", *wrong).returncode == 2


@pytest.mark.long
def test_audit_and_retry_know_the_archives_of_a_renamed_drop(stage: Stage) -> None:
    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        stage.put("good.cfg", b"good")
        stage.put("worse.cfg", b"bad")
        daemon.wait_for("archive.disposed", 2)
        assert daemon.stop() == 0
        rename_drop(stage, "routers")
        failed = stage.backupd("retry", "--all")
        assert failed.returncode == 2
        assert "its folder is that of no drop: switches" in failed.stderr
        assert stage.daemon().ready().stop() == 0

    assert stage.backupd("audit").returncode == 0
    assert stage.backupd("retry", "--all").stdout.startswith("1 archive put back")
    assert (stage.drop / "worse.cfg").read_bytes() == b"bad"
    assert list(stage.rejected.iterdir()) == []
