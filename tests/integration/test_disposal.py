"""Disposing of a batch of files, while somebody else works in the same folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.core.model import Archive, DeliveryState, fingerprint_of
from backupd.delivery.disposal import Disposal, Rule
from backupd.drop.folder import DropFolder
from backupd.drop.held import HeldFolder
from backupd.ledger.port import Ending, Settled
from backupd.ops import events
from backupd.ops.events import Event
from backupd.ops.lines import LineWriter
from backupd.ops.log import EventLog
from tests.factories import NOW


class Interrupting(EventLog):
    """Removes a folder once the first file was disposed of."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LineWriter(os.open(os.devnull, os.O_WRONLY)))
        self._folder: Path | None = folder

    def emit(self, event: Event, *, exc_info: BaseException | None = None, **keys: object) -> None:
        if event is events.ARCHIVE_DISPOSED and self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None
        super().emit(event, exc_info=exc_info, **keys)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "drop").mkdir()
    return tmp_path / "drop"


@pytest.fixture
def folder(root: Path) -> Iterator[DropFolder]:
    folder = DropFolder(str(root))
    yield folder
    folder.close()


def delivered(root: Path, number: int) -> Settled:
    path = root / f"r{number}.cfg"
    path.write_bytes(b"abc")
    archive = Archive(number, "switches", os.fsencode(path.name), fingerprint_of(path.stat()), NOW)
    ending = Ending(
        str(number), "vault", DeliveryState.DELIVERED, NOW, "sha256:00", True, 201, None, None, "{}"
    )
    return Settled(archive, DeliveryState.DELIVERED, "sha256:00", (ending,))


def test_a_sent_folder_that_is_removed_in_mid_batch_is_made_anew(folder: DropFolder, root: Path) -> None:
    rule = Rule(folder, "move", b"sent", b"rejected")
    disposal = Disposal({"switches": rule}, Interrupting(root / "sent"))
    done, failed = disposal.dispose([delivered(root, number) for number in range(3)])
    assert ([one.to for one in done], failed) == ([b"sent/r0.cfg", b"sent/r1.cfg", b"sent/r2.cfg"], [])
    assert {path.name for path in (root / "sent").iterdir()} >= {"r1.cfg", "r2.cfg", "r2.cfg.receipt.json"}


def test_many_directories_are_held_and_given_back(folder: DropFolder) -> None:
    before = len(os.listdir("/proc/self/fd"))
    held = HeldFolder(folder)
    for number in range(40):
        with held.directory(b"site-%d" % number, create=True) as one, held.directory(b"") as top:
            assert os.path.samestat(os.fstat(one), os.stat(b"site-%d" % number, dir_fd=top))
    assert len(os.listdir("/proc/self/fd")) - before <= 16
    held.close()
    assert len(os.listdir("/proc/self/fd")) == before
