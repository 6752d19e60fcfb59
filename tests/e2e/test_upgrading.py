"""A daemon of today on the ledger of the first version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.old_ledgers import AT, SECOND, SHA, create
from tests.stage import Stage


def an_archive(number: int, path: Path, state: str, moved_to: str = "") -> str:
    """Return the SQL for an archive of a file, with one delivery, as the first version wrote it."""
    status = path.stat()
    done = f"'done', CAST('{moved_to}' AS BLOB), {AT + SECOND}, 0" if moved_to else "NULL, NULL, NULL, 1"
    ended = "NULL" if state in ("pending", "claimed") else AT + SECOND
    return f"""
        INSERT INTO archive (id, drop_name, relpath, device, inode, size, mtime_ns, ctime_ns, admitted_at,
            state, disposition, disposed_to, disposed_at, live)
        VALUES ({number}, 'switches', CAST('{path.name}' AS BLOB), {status.st_dev}, {status.st_ino},
            {status.st_size}, {status.st_mtime_ns}, {status.st_ctime_ns}, {AT},
            '{"pending" if state == "claimed" else state}', {done});
        INSERT INTO delivery (id, archive_id, destination, size, state, due_at, ended_at, digest)
        VALUES ('0000000{number}-0000-4000-8000-000000000000', {number}, 'vault', {status.st_size}, '{state}',
            {AT}, {ended}, {f"'{SHA}'" if state == "delivered" else "NULL"});
    """


@pytest.mark.long
def test_archives_of_the_first_version_are_delivered_listed_and_retried(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.sent.mkdir()
    stage.rejected.mkdir()
    files = {
        "pending.cfg": (stage.drop, "pending", ""),
        "uploading.cfg": (stage.drop, "claimed", ""),
        "sent.cfg": (stage.sent, "delivered", "sent/sent.cfg"),
        "refused.cfg": (stage.rejected, "rejected", "rejected/refused.cfg"),
    }
    rows = ""
    for number, (name, (folder, state, moved_to)) in enumerate(files.items(), 1):
        path = stage.put(name, name.encode(), into=folder)
        rows += an_archive(number, path, state, moved_to)
    create(stage.state, 1, rows)
    stage.configure(receiver.url)

    daemon = stage.daemon().ready()
    for name in ("pending.cfg", "uploading.cfg"):
        (verified,) = daemon.wait_for("delivery.verified", archive=name)
        assert verified["delivery_id"].endswith("-0000-4000-8000-000000000000")
        daemon.wait_for("archive.disposed", archive=name)
    assert not daemon.events("archive.queued")
    listed = json.loads(stage.backupd("list", "--json").stdout)
    assert {each["archive"]["relpath"]: each["state"] for each in listed} == {
        "pending.cfg": "delivered",
        "uploading.cfg": "delivered",
        "sent.cfg": "delivered",
        "refused.cfg": "rejected",
    }
    retried = stage.backupd("retry", "--all")
    assert retried.returncode == 0, retried.stderr
    daemon.wait_for("archive.disposed", archive="refused.cfg")
    assert sorted(path.read_bytes() for path in stage.stored()) == [
        b"pending.cfg",
        b"refused.cfg",
        b"uploading.cfg",
    ]
    assert [path.name for path in stage.archives(stage.sent)] == sorted(files)
    assert daemon.stop() == 0
