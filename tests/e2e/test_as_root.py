"""Commands that run as root leave nothing that the daemon, which is another user, can't use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.privileges import a_folder_of_nobody
from tests.scripted import Peer, ScriptedServer, accept_all, http_response, in_turn, server_context
from tests.stage import Stage, a_stage

pytestmark = [pytest.mark.root, pytest.mark.long]

NOBODY = 65534
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    # the interpreter may be in a home folder
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"),
)


def give_away(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A stage in which everything belongs to another user than root."""
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv(1)")
    with a_folder_of_nobody() as base:
        yield from a_stage(base)


def refuses(peer: Peer) -> None:
    peer.read_request()
    peer.send(http_response(422))


def test_a_rejected_archive_that_root_puts_back_is_delivered(stage: Stage) -> None:
    with ScriptedServer(in_turn(refuses, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url)
        deep = stage.drop / "core" / "site-1"
        deep.mkdir(parents=True)
        stage.put("r1.cfg", b"content", into=deep)
        give_away(stage.base)
        stage.drop.chmod(0o2770)
        daemon = stage.daemon(before=AS_NOBODY)
        daemon.wait_for("archive.disposed")
        shutil.rmtree(stage.drop / "core")
        assert stage.backupd("status").returncode == 0
        assert daemon.stop() == 0

        old = os.umask(0o077)
        try:
            assert stage.backupd("retry", "--all").stdout.startswith("1 archive put back")
        finally:
            os.umask(old)
        for folder in (stage.drop / "core", deep):
            status = folder.stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (NOBODY, NOBODY, 0o2770)
        daemon = stage.daemon(before=AS_NOBODY)
        daemon.wait_for("archive.disposed", disposition="moved")
        assert (stage.sent / "core" / "site-1" / "r1.cfg").exists()
        assert daemon.stop() == 0


def test_the_ledger_stays_usable_for_the_daemon(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, drop='expect.every = "1d"\nexpect.by = "{stem}"')
        give_away(stage.base)
        for number in range(2):
            daemon = stage.daemon(before=AS_NOBODY).ready()
            stage.put(f"r{number}.cfg", b"content")
            daemon.wait_for("archive.disposed", archive=f"r{number}.cfg")
            for is_running in (True, False):
                if not is_running:
                    daemon.kill()
                for command in (["audit"], ["list"], ["forget", f"r{number}"], ["retry", "--all"]):
                    stage.backupd(*command)
                owners = {path.name: path.stat().st_uid for path in stage.state.iterdir()}
                assert set(owners.values()) == {NOBODY}, owners


def test_a_configuration_that_root_writes_can_be_read_by_the_group_of_its_folder(stage: Stage) -> None:
    folder = stage.base / "etc"
    folder.mkdir()
    os.chown(folder, 0, NOBODY)
    old = os.umask(0o077)
    try:
        assert stage.backupd("init", str(folder / "backupd.toml")).returncode == 0
    finally:
        os.umask(old)
    status = (folder / "backupd.toml").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, NOBODY, 0o640)
