"""Hostile file names and special files in a drop folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import sqlite3
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.config.load import load
from backupd.core.names import as_text
from backupd.ledger.factory import open_history
from backupd.ledger.history import Search
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.privileges import IS_ROOT
from tests.scripted import ScriptedServer, accept_all, server_context
from tests.stage import Daemon, Stage, a_stage

NAMES = [
    b'bad\xff\n".tar.gz',
    b"\xff\xfe\x80",
    b"x" * 248 + b".tar.gz",
    "ü".encode() * 124 + b".tar.gz",
    b"\xff" * 255,
    b"quo\"tes'.tar.gz",
    b'"; filename="other.tar.gz',
    b"100%22 %0D%0A %.tar.gz",
    b"a..tar.gz",
    "\u202egz.rat\u200f.tar.gz".encode(),
    b"line\nbreak\r\n.tar.gz",
    b'x\n{"event":"archive.delivered"}\n.tar.gz',
    b"back\\slash\\.tar.gz",
    b" leading.tar.gz",
    b"trailing.tar.gz ",
    b"  ",
    b"\t\x1b[31m\x07\x7f.tar.gz",
    b"--help",
    b"{name}{relpath!r}.tar.gz",
    "e\u0301 and \u00e9 \u2028 \U0001f4be.tar.gz".encode(),
    b"%s%n%x.tar.gz",
    b"$(reboot);`reboot`|*?[a].tar.gz",
]
ALL = 'inspect = "off"\nrescan_every = "0.3s"'
DEBUG = '[log]\nlevel = "debug"'
TEMPLATES = """
fields = { description = "Backup {name} of {relpath}" }
headers = { X-Name = "{name}" }
"""


def names_in(folder: Path) -> set[bytes]:
    return set(os.listdir(os.fsencode(folder)))


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage where all hostile names were delivered; the content of each file is its name."""
    for stage in a_stage(tmp_path_factory.mktemp("stage")):
        tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
        with RunningReceiver(stage.store, tls) as receiver:
            stage.configure(receiver.url + "?of={name}", drop=ALL, destination=TEMPLATES)
            daemon = stage.daemon().ready()
            for name in NAMES:
                stage.put(name, name)
            daemon.wait_for("archive.disposed", count=len(NAMES))
            assert daemon.stop() == 0
        yield stage


@pytest.mark.long
def test_every_name_is_delivered_and_keeps_its_bytes(delivered: Stage) -> None:
    stage = delivered
    sent = {name: Path(os.fsdecode(os.path.join(os.fsencode(stage.sent), name))) for name in NAMES}
    assert {name: path.read_bytes() for name, path in sent.items()} == {name: name for name in NAMES}
    assert names_in(stage.drop) == {b"sent"}
    assert sorted(path.read_bytes() for path in stage.stored()) == sorted(NAMES)

    records = [name for name in names_in(stage.sent) if name.endswith(b".receipt.json")]
    assert len(records) == len(NAMES)
    assert all(len(name) <= 255 for name in records)
    short = [name for name in NAMES if len(name) < 200]
    assert {name + b".receipt.json" for name in short} < set(records)
    recorded = [json.loads((stage.sent / os.fsdecode(name)).read_bytes())["archive"] for name in records]
    assert sorted(recorded) == sorted(map(as_text, NAMES))


@pytest.mark.long
def test_no_name_forges_or_splits_a_line_of_the_log(delivered: Stage) -> None:
    raw = (delivered.base / "daemon.log").read_bytes()
    assert raw.isascii()
    events = [json.loads(line) for line in raw.rstrip(b"\n").split(b"\n")]
    count = Counter((event["event"], event.get("archive")) for event in events if "archive" in event)
    kinds = ("archive.queued", "delivery.verified", "archive.delivered", "archive.disposed")
    assert count == Counter((kind, as_text(name)) for kind in kinds for name in NAMES)


@pytest.mark.long
def test_the_ledger_returns_every_name_with_the_same_bytes(delivered: Stage) -> None:
    with contextlib.closing(open_history(load(delivered.config))) as history:
        records = history.find(Search(), 1000)
    assert sorted(record.archive.relpath for record in records) == sorted(NAMES)
    assert {record.disposed_to for record in records} == {b"sent/" + name for name in NAMES}

    listed = delivered.backupd("list", "--json")
    assert [entry["state"] for entry in json.loads(listed.stdout)] == ["delivered"] * len(NAMES)
    table = delivered.backupd("list")
    assert table.returncode == 0, table.stderr
    assert len([line for line in table.stdout.splitlines() if " delivered " in line]) == len(NAMES)
    assert "\x1b" not in table.stdout
    for record in records[:2]:
        assert delivered.backupd("show", record.id).returncode == 0


@pytest.mark.long
def test_the_receiver_parses_every_form_correctly(delivered: Stage) -> None:
    index = sqlite3.connect(delivered.store / "index.sqlite")
    rows = index.execute("SELECT name, fields, size FROM archive").fetchall()
    index.close()
    assert len(rows) == len(NAMES)
    for name, fields, _ in rows:
        assert set(json.loads(fields)) == {"description", "sha256"}
        assert "/" not in name
    plain = {name.decode() for name in NAMES if name.isascii() and name.decode().isprintable()}
    escapable = {name for name in plain if not set(name) & set('"\\%')}
    assert escapable <= {name for name, _, _ in rows}


def test_werkzeug_parses_the_same_forms(stage: Stage) -> None:
    formparser = pytest.importorskip("werkzeug.formparser")
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, drop=ALL, destination=TEMPLATES)
        daemon = stage.daemon().ready()
        for name in NAMES:
            stage.put(name, name)
        daemon.wait_for("archive.disposed", count=len(NAMES))
        daemon.stop()

    contents = []
    for request in server.requests:
        environ = {
            "REQUEST_METHOD": "POST",
            "CONTENT_TYPE": request.header("content-type"),
            "CONTENT_LENGTH": str(len(request.body)),
            "wsgi.input": io.BytesIO(request.body),
        }
        _, form, files = formparser.parse_form_data(environ, silent=False)
        assert set(form) == {"description", "sha256"}
        (file,) = files.values()
        assert file.filename
        assert "\n" not in file.filename
        contents.append(file.read())
        assert form["sha256"] == hashlib.sha256(contents[-1]).hexdigest()
        file.close()
    assert sorted(contents) == sorted(NAMES)


def test_a_file_with_a_hidden_name_is_ignored_and_not_logged(stage: Stage, receiver: RunningReceiver) -> None:
    hidden = [b"..tar.gz", b"...", b".\xff.tar.gz"]
    stage.configure(receiver.url, drop=ALL, more=DEBUG)
    for name in hidden:
        stage.put(name, b"hidden")
    daemon = stage.daemon().ready()
    stage.put("proof.cfg", b"seen")

    daemon.wait_for("archive.disposed", archive="proof.cfg")
    wait_for_scans(daemon)

    assert [event["archive"] for event in daemon.events() if "archive" in event] == ["proof.cfg"] * 4
    assert names_in(stage.drop) == {*hidden, b"sent"}


def wait_for_scans(daemon: Daemon) -> None:
    """Wait for a few further scans of the folder."""
    daemon.wait_for("drop.scanned", count=len(daemon.events("drop.scanned")) + 4)


def a_directory(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path itself may be too long for it
    os.close(folder)


def a_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero


def a_symlink(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(b"the target of a link must not be uploaded")
    path.symlink_to(outside)


def a_dangling_symlink(path: Path) -> None:
    path.symlink_to("nowhere")


def a_symlink_to_a_folder(path: Path) -> None:
    outside = path.parent.parent / "folder"
    outside.mkdir()
    (outside / "inner.tar.gz").write_bytes(b"must not be uploaded")
    path.symlink_to(outside)


def an_empty_file(path: Path) -> None:
    path.touch()


def an_oversized_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 1_000_001)


SPECIAL_FILES = {
    a_directory: None,
    a_fifo: "not_a_regular_file",
    a_socket: "not_a_regular_file",
    a_device: "not_a_regular_file",
    a_symlink: "symlink",
    a_dangling_symlink: "symlink",
    a_symlink_to_a_folder: "symlink",
    an_empty_file: "too_small",
    an_oversized_file: "too_large",
}


@pytest.mark.long
@pytest.mark.parametrize("when", ["before the start", "while it runs"])
def test_a_special_file_is_logged_once_and_stops_no_archive(
    stage: Stage, receiver: RunningReceiver, when: str
) -> None:
    stage.configure(receiver.url, drop=ALL + '\nmax_size = "1MB"', more=DEBUG)
    special = {
        make.__name__ + ".tar.gz": why
        for make, why in SPECIAL_FILES.items()
        if make is not a_device or IS_ROOT
    }
    daemon = stage.daemon().ready() if when == "while it runs" else None
    for make in SPECIAL_FILES:
        if make is not a_device or IS_ROOT:
            make(stage.drop / f"{make.__name__}.tar.gz")
        stage.put(f"beside-{make.__name__}.tar.gz", make.__name__.encode())
    daemon = daemon or stage.daemon()

    daemon.wait_for("archive.disposed", count=len(SPECIAL_FILES))
    wait_for_scans(daemon)

    ignored = [(event["archive"], event["reason"]) for event in daemon.events("archive.ignored")]
    assert sorted(ignored) == sorted((name, why) for name, why in special.items() if why)
    assert sorted(path.read_bytes() for path in stage.stored()) == sorted(
        m.__name__.encode() for m in SPECIAL_FILES
    )
    assert {os.fsencode(name) for name in special} == names_in(stage.drop) - {b"sent"}
    assert not daemon.events("attempt.failed")


@pytest.fixture
def no_privileges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the daemons of root without the capabilities that override file permissions."""
    if not IS_ROOT:
        return
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv(1)")
    python = tmp_path / "python"
    drop = "--bounding-set=-dac_override,-dac_read_search"
    python.write_text(f'#!/bin/sh\nexec setpriv {drop} {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.mark.long
def test_an_unreadable_file_is_logged_once_and_delivered_once_it_is_readable(
    stage: Stage, receiver: RunningReceiver, no_privileges: None
) -> None:
    stage.configure(receiver.url, drop=ALL, more=DEBUG)
    staging = stage.base / "staged.tar.gz"
    staging.write_bytes(b"unreadable")
    staging.chmod(0)
    unreadable = staging.rename(stage.drop / "unreadable.tar.gz")
    folder = stage.drop / "folder"
    folder.mkdir(mode=0)
    daemon = stage.daemon().ready()
    stage.put("other.tar.gz", b"other")

    daemon.wait_for("archive.disposed", archive="other.tar.gz")
    wait_for_scans(daemon)
    ignored = [(event["archive"], event["reason"]) for event in daemon.events("archive.ignored")]
    assert sorted(ignored) == [("folder", "unreadable"), ("unreadable.tar.gz", "unreadable")]

    unreadable.chmod(0o640)
    folder.chmod(0o750)
    stage.put("inner.tar.gz", b"inner", into=folder)
    daemon.wait_for("archive.disposed", archive="unreadable.tar.gz")
    daemon.wait_for("archive.disposed", archive="folder/inner.tar.gz")
    assert sorted(path.read_bytes() for path in stage.stored()) == [b"inner", b"other", b"unreadable"]
    assert len(daemon.events("archive.ignored")) == 2
