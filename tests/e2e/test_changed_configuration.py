"""A changed configuration loses no archive and sends none again, by a reload as well as by a restart."""

from __future__ import annotations

import json
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
