"""The drop folder on a real filesystem, while other processes write there at the same time."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from backupd.core.filesystems import is_remote
from backupd.core.model import Fingerprint, fingerprint_of
from backupd.core.names import free_names
from backupd.dropfolder import move as moving
from backupd.dropfolder.content import ExpectedFile
from backupd.dropfolder.filesystem import filesystem_of, is_being_written
from backupd.dropfolder.folder import DirectoryCache, DropFolder, walk
from backupd.dropfolder.move import (
    FileChangedError,
    partial_file_name,
    remove_partial_files,
    rename_no_replace,
    write_new_file,
)
from tests.factories import NOW
from tests.privileges import a_folder_of_nobody, without_rights
from tests.stage import Stage

PART = partial_file_name(1, 2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The drop folder's path; beside it is `outside`, which must never be touched."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.cfg").write_text("secret")
    (tmp_path / "drop").mkdir()
    return tmp_path / "drop"


@pytest.fixture
def folder(root: Path) -> Iterator[DropFolder]:
    folder = DropFolder(str(root))
    yield folder
    folder.close()


def put(path: Path, content: bytes = b"abc") -> Fingerprint:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return fingerprint_of(path.stat())


def move(folder: DropFolder, relpath: bytes, expected: Fingerprint, *where: Any) -> bytes:
    return moving.move(folder, relpath, ExpectedFile(expected, None), *where)


def find_moved(folder: DropFolder, relpath: bytes, expected: Fingerprint, *where: Any) -> bytes | None:
    return moving.find_moved(folder, relpath, ExpectedFile(expected, None), *where)


def names_of(name: bytes) -> Iterator[bytes]:
    return free_names(name, NOW)


@contextmanager
def refused(*codes: int) -> Iterator[None]:
    """Expect an OSError with one of these error numbers."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 -- the error number is checked below
        yield
    assert caught.value.errno in codes


def split(relpath: bytes) -> tuple[bytes, list[bytes]]:
    parent, _, name = relpath.rpartition(b"/")
    return parent, [name]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# opening


def test_a_file_is_opened_and_read(folder: DropFolder, root: Path) -> None:
    put(root / "site" / "r1.cfg", b"hostname r1")
    assert folder.read(b"site/r1.cfg", 8) == b"hostname"
    assert folder.stat(b"site/r1.cfg").st_size == 11


def test_nothing_is_opened_through_a_linked_directory(folder: DropFolder, root: Path) -> None:
    (root / "site").symlink_to(root.parent / "outside")
    for action in (folder.open, folder.stat, folder.unlink):
        with pytest.raises(NotADirectoryError):
            action(b"site/secret.cfg")
    with pytest.raises(NotADirectoryError):
        write_new_file(folder, b"site", [b"new.cfg"], b"x", PART)
    assert sorted(path.name for path in (root.parent / "outside").iterdir()) == ["secret.cfg"]


def test_a_directory_replaced_by_a_link_after_the_scan_is_not_followed(
    folder: DropFolder, root: Path
) -> None:
    fingerprint = put(root / "site" / "secret.cfg")
    (root / "site").rename(root / "away")
    (root / "site").symlink_to(root.parent / "outside")
    with pytest.raises(NotADirectoryError):
        folder.open(b"site/secret.cfg")
    with pytest.raises(NotADirectoryError):
        move(folder, b"site/secret.cfg", fingerprint, b"sent", names_of(b"secret.cfg"), b".taken")
    assert (root.parent / "outside" / "secret.cfg").read_text() == "secret"


def test_the_path_of_the_drop_folder_itself_may_be_a_symbolic_link(root: Path) -> None:
    put(root / "r1.cfg")
    link = root.parent / "link"
    link.symlink_to(root)
    folder = DropFolder(str(link))
    assert folder.read(b"r1.cfg", 9) == b"abc"
    assert folder.is_in_place()
    folder.close()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "outside" / "secret.cfg")


def _directory(path: Path) -> None:
    path.mkdir()


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is limited to 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [_fifo, _link, _directory, _socket])
def test_a_file_that_is_not_regular_is_refused_without_blocking(
    folder: DropFolder, root: Path, make: object
) -> None:
    assert callable(make)
    make(root / "r1.cfg")
    before = open_descriptors()
    with refused(errno.EINVAL, errno.ELOOP, errno.ENXIO):
        folder.open(b"r1.cfg")
    assert open_descriptors() == before


@pytest.mark.parametrize(
    "relpath", [b"../outside/secret.cfg", b"site/../../outside/secret.cfg", b"./x/r1", b".."]
)
def test_a_path_with_dots_is_refused(folder: DropFolder, root: Path, relpath: bytes) -> None:
    (root / "site").mkdir()
    before = open_descriptors()
    with refused(errno.EINVAL):
        folder.open(relpath)
    with refused(errno.EINVAL, errno.EEXIST):
        write_new_file(folder, *split(relpath), b"x", PART)
    with refused(errno.EINVAL, errno.EISDIR):
        folder.unlink(relpath)
    assert open_descriptors() == before
    assert (root.parent / "outside" / "secret.cfg").exists()


def test_missing_directories_are_created_only_with_create(folder: DropFolder, root: Path) -> None:
    with pytest.raises(FileNotFoundError), folder.directory(b"a/b"):
        pass
    with folder.directory(b"a/b", create=True):
        assert (root / "a" / "b").is_dir()


def test_a_new_file_is_written_completely_and_never_overwritten(folder: DropFolder, root: Path) -> None:
    write_new_file(folder, b"sent", [b"r1.cfg.receipt.json"], b"{}" * 100_000, PART)
    assert (root / "sent/r1.cfg.receipt.json").read_bytes() == b"{}" * 100_000
    with pytest.raises(FileExistsError):
        write_new_file(folder, b"sent", [b"r1.cfg.receipt.json"], b"other", PART)
    folder.sync(b"sent")
    folder.unlink(b"sent/r1.cfg.receipt.json")
    assert list((root / "sent").iterdir()) == []


def test_the_partial_files_of_earlier_sessions_are_removed_and_no_others(
    folder: DropFolder, root: Path
) -> None:
    others = [b".backupd-7.taken", b".backupd-7-x.part", b".x.part", b"backupd-7-1.part", b"r1.cfg"]
    left = [partial_file_name(7, 1), partial_file_name(12, 11)]
    for name in (*others, *left, PART):
        put(root / "sent" / os.fsdecode(name))
    remove_partial_files(folder, b"sent", 2)
    assert sorted(map(os.fsencode, os.listdir(root / "sent"))) == sorted([*others, PART])


@pytest.mark.root
def test_a_new_file_that_does_not_fit_on_the_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        folder = DropFolder(str(disk))
        with pytest.raises(OSError, match="No space left"):
            write_new_file(folder, b"sent", [b"r1.receipt.json"], bytes(1_000_000), PART)
        assert list((disk / "sent").iterdir()) == []
        folder.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_replaced_drop_folder_is_detected_and_reopened(folder: DropFolder, root: Path) -> None:
    assert folder.is_in_place()
    put(root / "old.cfg")
    root.rename(root.parent / "away")
    assert not folder.is_in_place()
    with pytest.raises(FileNotFoundError):
        folder.reopen()
    assert folder.read(b"old.cfg", 9) == b"abc"
    root.mkdir()
    put(root / "new.cfg")
    assert not folder.is_in_place()
    number, before = folder.fileno(), open_descriptors()
    folder.reopen()
    assert (folder.fileno(), open_descriptors()) == (number, before)
    assert folder.is_in_place()
    assert folder.read(b"new.cfg", 9) == b"abc"
    assert not os.get_inheritable(number)


def test_a_missing_file_may_be_on_an_unmounted_filesystem_if_its_folder_is_another_one(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = folder.id()
    assert not folder.is_unmounted(earlier)
    assert not folder.is_unmounted(root.stat().st_ino)  # as earlier versions stored it
    root.rename(root.parent / "away")
    assert folder.is_unmounted(earlier)
    root.mkdir()  # the mount point
    assert folder.is_unmounted(earlier)
    folder.reopen()
    assert folder.is_unmounted(earlier)
    assert not folder.is_unmounted(folder.id())
    put(root / "new.cfg")
    assert folder.is_unmounted(earlier)
    tomorrow = time.monotonic() + 86_400
    monkeypatch.setattr(time, "monotonic", lambda: tomorrow)
    assert not folder.is_unmounted(earlier)
    (root / "new.cfg").unlink()
    assert folder.is_unmounted(earlier)


# walking


def walked(
    folder: DropFolder, below: bytes = b"", skips: Callable[[bytes], bool] = lambda _: False
) -> tuple[list[bytes], list[bytes]]:
    """Return the paths that were found, sorted, and those reported as unreadable."""
    unreadable: list[bytes] = []

    def on_unreadable(relpath: bytes, _error: OSError) -> None:
        unreadable.append(relpath)

    found = [relpath for relpath, _ in walk(folder, below, skips, on_unreadable)]
    return sorted(found), unreadable


def test_a_walk_finds_all_files_except_in_skipped_or_linked_directories(
    folder: DropFolder, root: Path
) -> None:
    for name in ("r1", "a/r2", "a/b/r3", "sent/r4", "a/sent/r5", ".hidden/r6", "a/.r7"):
        put(root / name)
    (root / "link").symlink_to(root.parent / "outside")
    put(Path(os.fsdecode(os.fsencode(root) + b"/bad\xff\n")))
    found, unreadable = walked(folder, skips=lambda directory: directory in (b"sent", b".hidden"))
    inside = [b"a/.r7", b"a/b/r3", b"a/r2", b"a/sent/r5"]
    assert found == [b".hidden", *inside, b"bad\xff\n", b"link", b"r1", b"sent"]
    assert unreadable == []


def test_a_walk_of_a_subdirectory_finds_only_the_files_in_it(folder: DropFolder, root: Path) -> None:
    for name in ("r1", "a/r2", "a/b/r3"):
        put(root / name)
    assert walked(folder, b"a") == ([b"a/b/r3", b"a/r2"], [])
    assert walked(folder, skips=lambda _: True) == ([b"a", b"r1"], [])


def test_a_walk_returns_the_status_of_a_link_and_not_of_its_target(folder: DropFolder, root: Path) -> None:
    (root / "link").symlink_to(root.parent / "outside" / "secret.cfg")
    ((_, status),) = walk(folder, b"", lambda _: False, lambda *_: None)
    assert stat.S_ISLNK(status.st_mode)


def test_a_walk_continues_when_directories_disappear_meanwhile(folder: DropFolder, root: Path) -> None:
    for number in range(50):
        put(root / "a" / f"r{number}")
        put(root / "b" / f"r{number}")
    unreadable: list[bytes] = []
    steps = walk(folder, b"", lambda _: False, lambda relpath, _: unreadable.append(relpath))
    found = [next(steps)[0]]
    for directory in ("a", "b"):
        for path in (root / directory).iterdir():
            path.unlink()
        (root / directory).rmdir()
    found += [relpath for relpath, _ in steps]
    assert unreadable == []
    assert len(found) < 100
    assert walked(folder, b"a") == ([], [])


def test_two_walks_at_the_same_time_each_find_all_files(folder: DropFolder, root: Path) -> None:
    for number in range(3000):  # more than one getdents call returns
        put(root / f"r{number}")
    steps = walk(folder, b"", lambda _: False, lambda *_: None)
    first = [next(steps)[0]]
    assert len(walked(folder)[0]) == 3000
    assert len(first + [relpath for relpath, _ in steps]) == 3000


def test_a_path_longer_than_path_max_is_reported_as_unreadable(folder: DropFolder, root: Path) -> None:
    with closing(DirectoryCache(folder)) as directories:
        relpath = b""
        while len(relpath) < 4096:
            os.mkdir(b"d" * 200, dir_fd=directories.directory(relpath))
            relpath = (relpath + b"/" if relpath else b"") + b"d" * 200
        with pytest.raises(OSError, match="too long"):
            directories.directory(relpath)
    assert walked(folder)[1] == [relpath]


def test_a_walk_opens_each_directory_from_its_parent(root: Path) -> None:
    class Counting(DropFolder):
        opened = 0

        @contextmanager
        def directory(self, relpath: bytes, *, create: bool = False) -> Iterator[int]:
            self.opened += len(relpath.split(b"/"))
            with super().directory(relpath, create=create) as fd:
                yield fd

    deepest = "/".join("d" * 500)
    put(root / deepest / "r1")
    folder = Counting(str(root))
    assert walked(folder) == ([os.fsencode(deepest) + b"/r1"], [])
    assert folder.opened == 1
    folder.close()


@pytest.mark.parametrize("before", [b"", b"a", b"a/c"])
def test_the_directory_cache_follows_neither_links_nor_dots(
    folder: DropFolder, root: Path, before: bytes
) -> None:
    put(root / "a/c/r1")
    put(root.parent / "outside" / "r2")
    with closing(DirectoryCache(folder)) as directories:
        directories.directory(before)
        (root / "a/b").symlink_to(root.parent / "outside")
        for relpath in (b"a/b", b"a/..", before + b"/..", before + b"/."):
            with pytest.raises(OSError, match=r"Not a directory|Too many levels|must not contain"):
                directories.directory(relpath)
            assert os.listdir(directories.directory(before)) == os.listdir(root / os.fsdecode(before))


def test_a_walk_ignores_a_directory_that_became_a_file_or_link(folder: DropFolder, root: Path) -> None:
    (root / "link").symlink_to(root)
    put(root / "file")
    assert walked(folder, b"link") == ([], [])
    assert walked(folder, b"file") == ([], [])


def test_a_walk_reports_an_unreadable_directory_and_finds_the_other_files() -> None:
    with a_folder_of_nobody() as root:
        for name in ("closed/r1", "open/r2", "r3"):
            put(root / name)
        (root / "closed").chmod(0)
        folder = DropFolder(str(root))
        with without_rights():
            assert walked(folder) == ([b"open/r2", b"r3"], [b"closed"])
        (root / "closed").chmod(0o755)
        folder.close()


def test_an_abandoned_walk_leaves_no_descriptor_open(folder: DropFolder, root: Path) -> None:
    put(root / "a/b/r1")
    before = open_descriptors()
    steps = walk(folder, b"", lambda _: False, lambda *_: None)
    next(steps)
    steps.close()  # type: ignore[attr-defined]  # it is a generator
    assert open_descriptors() == before


# moving


def test_a_file_is_moved_into_a_new_directory(folder: DropFolder, root: Path) -> None:
    fingerprint = put(root / "site" / "r1.cfg")
    assert (
        move(folder, b"site/r1.cfg", fingerprint, b"sent/site", names_of(b"r1.cfg"), b".taken")
        == b"sent/site/r1.cfg"
    )
    assert (root / "sent/site/r1.cfg").read_bytes() == b"abc"
    assert not (root / "site" / "r1.cfg").exists()
    assert (
        move(
            folder,
            b"sent/site/r1.cfg",
            fingerprint_of((root / "sent/site/r1.cfg").stat()),
            b"",
            names_of(b"x"),
            b".taken",
        )
        == b"x"
    )


def test_a_move_never_overwrites(folder: DropFolder, root: Path) -> None:
    expected = [b"sent/r1.cfg", b"sent/r1.cfg.20260304T050607Z", b"sent/r1.cfg.20260304T050607Z-2"]
    for number, new_name in enumerate(expected):
        fingerprint = put(root / "r1.cfg", b"%d" % number)
        assert move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken") == new_name
    assert [(root / os.fsdecode(name)).read_bytes() for name in expected] == [b"0", b"1", b"2"]


def test_a_move_replaces_neither_a_directory_nor_a_link(folder: DropFolder, root: Path) -> None:
    (root / "sent" / "r1.cfg").mkdir(parents=True)
    (root / "sent" / "r2.cfg").symlink_to("nowhere")
    for name in (b"r1.cfg", b"r2.cfg"):
        fingerprint = put(root / os.fsdecode(name))
        assert (
            move(folder, name, fingerprint, b"sent", names_of(name), b".taken")
            == b"sent/" + name + b".20260304T050607Z"
        )


def test_a_missing_or_changed_file_is_not_moved(folder: DropFolder, root: Path) -> None:
    fingerprint = put(root / "r1.cfg")
    put(root / "r1.cfg", b"longer than before")
    with pytest.raises(FileChangedError):
        move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")
    assert (root / "r1.cfg").exists()
    (root / "r1.cfg").unlink()
    with pytest.raises(FileNotFoundError):
        move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")


def test_without_a_free_name_a_file_stays_in_place(folder: DropFolder, root: Path) -> None:
    fingerprint = put(root / "r1.cfg")
    put(root / "sent" / "r1.cfg")
    with pytest.raises(FileExistsError):
        move(folder, b"r1.cfg", fingerprint, b"sent", iter([b"r1.cfg"]), b".taken")
    assert (root / "r1.cfg").exists()


class InterruptedMoveError(BaseException):
    """A SIGKILL in the middle of a move."""


def interrupt_after_first_rename(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch, new: bytes | None
) -> Fingerprint:
    """Interrupt a move after its first rename; with `new`, a producer replaced the file just before it."""
    fingerprint = put(root / "r1.cfg", b"old")
    rename = moving.rename_no_replace

    def rename_then_stop(source: int, name: bytes, target: int, new_name: bytes) -> None:
        if new is not None:
            put(root.parent / "new", new)
            (root.parent / "new").rename(root / "r1.cfg")
        rename(source, name, target, new_name)
        raise InterruptedMoveError

    with monkeypatch.context() as patched:
        patched.setattr(moving, "rename_no_replace", rename_then_stop)
        with pytest.raises(InterruptedMoveError):
            move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")
    return fingerprint


def test_an_interrupted_move_is_finished(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "sent" / "r1.cfg", b"an older one")
    fingerprint = interrupt_after_first_rename(folder, root, monkeypatch, None)

    moved_to = find_moved(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")

    assert moved_to is not None
    assert (root / os.fsdecode(moved_to)).read_bytes() == b"old"
    assert not (root / "r1.cfg").exists()
    assert len(list((root / "sent").iterdir())) == 2


def test_a_wrong_file_of_an_interrupted_move_is_moved_back(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = interrupt_after_first_rename(folder, root, monkeypatch, b"never delivered")
    put(root / "r1.cfg", b"the next one")

    assert find_moved(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken") is None

    assert (root / "1-r1.cfg").read_bytes() == b"never delivered"
    assert (root / "r1.cfg").read_bytes() == b"the next one"
    assert list((root / "sent").iterdir()) == []


def test_a_file_renamed_over_the_name_just_before_the_move_is_moved_back(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = put(root / "r1.cfg", b"old")
    put(root.parent / "new", b"new")
    rename = moving.rename_no_replace

    def rename_after_a_producer(source: int, name: bytes, target: int, new_name: bytes) -> None:
        if (root.parent / "new").exists():
            (root.parent / "new").rename(root / "r1.cfg")
        rename(source, name, target, new_name)

    monkeypatch.setattr(moving, "rename_no_replace", rename_after_a_producer)
    with pytest.raises(FileChangedError):
        move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")
    assert (root / "r1.cfg").read_bytes() == b"new"
    assert list((root / "sent").iterdir()) == []


def test_a_moved_file_is_found_after_a_crash(folder: DropFolder, root: Path) -> None:
    fingerprint = put(root / "r1.cfg")
    put(root / "sent" / "r1.cfg", b"an older one")
    put(root / "r1.cfg")  # rewritten in place: the inode is the same
    fingerprint = fingerprint_of((root / "r1.cfg").stat())
    moved_to = move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")
    put(root / "r1.cfg", b"a newer one")
    assert find_moved(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken") == moved_to


def test_a_file_that_was_never_moved_is_not_found(folder: DropFolder, root: Path) -> None:
    fingerprint = put(root / "r1.cfg")
    assert find_moved(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken") is None
    put(root / "sent" / "r1.cfg", b"another")
    assert find_moved(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken") is None
    assert find_moved(folder, b"r1.cfg", fingerprint, b"sent", iter([b"r1.cfg"]), b".taken") is None


class OldFilesystem:
    """A C library with a renameat2(2) that fails, as on a filesystem without RENAME_NOREPLACE."""

    def __init__(self, error: int) -> None:
        self._error = error

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self._error)
        return -1


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize(
    "refusal",
    [None, errno.EPERM, errno.EOPNOTSUPP, errno.EIO],
    ids=["linked", "EPERM", "EOPNOTSUPP", "EIO"],
)
def test_without_renameat2_a_file_is_renamed_and_none_overwritten(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch, error: int, refusal: int | None
) -> None:
    def refuse(*_: object, **__: object) -> None:
        assert refusal is not None
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(moving, "_libc", OldFilesystem(error))
    if refusal is not None:
        monkeypatch.setattr(os, "link", refuse)
    for expected in (b"sent/r1.cfg", b"sent/r1.cfg.20260304T050607Z"):
        fingerprint = put(root / "r1.cfg", expected)
        assert move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken") == expected
        assert (root / os.fsdecode(expected)).read_bytes() == expected
        assert not (root / "r1.cfg").exists()


def test_without_renameat2_no_file_is_overwritten_that_appears_during_the_rename(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts may use the same free name at the same moment."""
    monkeypatch.setattr(moving, "_libc", OldFilesystem(errno.EINVAL))
    names = [b"%d" % number for number in range(500)]
    for number, name in enumerate(names):
        for source in ("one", "two"):
            put(root / source / os.fsdecode(name), b"%s of %d" % (source.encode(), number))
    overwriting: list[bytes] = []
    together = threading.Barrier(2)

    def work(source: bytes) -> None:
        with folder.directory(source) as fd, folder.directory(b"sent", create=True) as target:
            for name in names:
                together.wait()
                with suppress(FileExistsError):
                    rename_no_replace(fd, name, target, name)
                    overwriting.append(name)

    threads = [threading.Thread(target=work, args=(source,)) for source in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(overwriting) == sorted(names)
    assert sum(len(os.listdir(root / place)) for place in ("one", "two", "sent")) == 2 * len(names)


@pytest.mark.parametrize("number", [1, 2], ids=["to the hidden name", "to the new name"])
def test_a_move_that_is_interrupted_between_two_links_is_finished(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(moving, "_libc", OldFilesystem(errno.EINVAL))
    fingerprint = put(root / "r1.cfg", b"abc")
    unlink, calls = os.unlink, iter(range(1, 9))

    def interrupted(name: bytes, *, dir_fd: int) -> None:
        if next(calls) == number:
            raise InterruptedMoveError
        unlink(name, dir_fd=dir_fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", interrupted)
        with pytest.raises(InterruptedMoveError):
            move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")
    assert sum(path.is_file() for path in root.rglob("*")) == 2

    moved_to = find_moved(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")
    assert moved_to == b"sent/r1.cfg"
    assert [path for path in root.rglob("*") if path.is_file()] == [root / "sent/r1.cfg"]


def test_another_error_of_a_rename_is_raised(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "_libc", OldFilesystem(errno.EXDEV))
    fingerprint = put(root / "r1.cfg")
    with pytest.raises(OSError, match="cross-device") as failed:
        move(folder, b"r1.cfg", fingerprint, b"sent", names_of(b"r1.cfg"), b".taken")
    assert failed.value.errno == errno.EXDEV
    assert (root / "r1.cfg").exists()


def test_threads_that_move_files_of_the_same_name_lose_none(folder: DropFolder, root: Path) -> None:
    fingerprints = {
        f"{place}/r1.cfg": put(root / f"{place}" / "r1.cfg", b"%d" % place) for place in range(40)
    }
    moved: list[bytes] = []
    todo = iter(list(fingerprints.items()))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                item = next(todo, None)
            if item is None:
                return
            moved.append(
                move(folder, os.fsencode(item[0]), item[1], b"sent", names_of(b"r1.cfg"), b".%d" % hash(item))
            )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = {(root / os.fsdecode(name)).read_bytes() for name in moved}
    assert contents == {b"%d" % place for place in range(40)}
    assert len(set(moved)) == 40


# mounts

MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /proc rw,nosuid - proc proc rw
30 21 0:40 / /srv rw,relatime shared:2 master:1 - xfs /dev/sdb1 rw
31 30 0:41 / /srv/nas rw - nfs4 nas:/export rw
32 30 0:42 / /srv/two\040words\134\011x rw - cifs //nas/share rw
33 30 0:43 / /srv/over rw - ext4 /dev/sdc1 rw
34 33 0:44 / /srv/over rw - fuse.sshfs host:/ rw
35 30 0:45 / /srv/nasty rw - btrfs /dev/sdd1 rw
"""


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        ("/", "ext4"),
        ("/home/x", "ext4"),
        ("/srv", "xfs"),
        ("/srv/drop", "xfs"),
        ("/srv/nas", "nfs4"),
        ("/srv/nas/drop/r1", "nfs4"),
        ("/srv/nas2", "xfs"),
        ("/srv/nasty/drop", "btrfs"),
        ("/srv/two words\\\tx/drop", "cifs"),
        ("/srv/over/drop", "fuse.sshfs"),
        ("/srv/nas/../drop", "xfs"),
    ],
)
def test_the_filesystem_is_that_of_the_innermost_and_last_mount(
    tmp_path: Path, path: str, filesystem: str
) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS.lstrip())
    assert filesystem_of(path, str(mountinfo)) == filesystem


def test_the_filesystem_of_a_link_is_that_of_its_target(root: Path) -> None:
    (root / "link").symlink_to("/proc")
    assert filesystem_of(str(root / "link")) == "proc"


def test_without_any_mount_the_filesystem_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("")
    assert filesystem_of("/srv", str(tmp_path / "mountinfo")) == "unknown"


@pytest.mark.parametrize(
    "filesystem", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse", "virtiofs", "ceph"]
)
def test_network_filesystems_are_remote(filesystem: str) -> None:
    assert is_remote(filesystem)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs", "tmpfs", "zfs", "overlay", "vfat", "unknown"])
def test_local_filesystems_are_not_remote(filesystem: str) -> None:
    assert not is_remote(filesystem)


# writers


@pytest.fixture
def _sigio_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.mark.usefixtures("_sigio_ignored")
def test_a_file_open_for_writing_is_detected_until_it_is_closed(folder: DropFolder, root: Path) -> None:
    put(root / "r1.cfg")
    fd = folder.open(b"r1.cfg")
    assert not is_being_written(fd)
    with (root / "r1.cfg").open("ab"):
        assert is_being_written(fd)
    assert not is_being_written(fd)
    with (root / "r1.cfg").open("rb"):
        assert not is_being_written(fd)
    os.close(fd)


@pytest.mark.root
@pytest.mark.usefixtures("_sigio_ignored")
def test_without_permission_for_a_lease_no_file_counts_as_being_written(
    folder: DropFolder, root: Path
) -> None:
    put(root / "r1.cfg")
    fd = folder.open(b"r1.cfg")
    with (root / "r1.cfg").open("ab"):
        assert is_being_written(fd)
        with without_rights():
            assert not is_being_written(fd)
    os.close(fd)


def test_a_pipe_which_supports_no_lease_does_not_count_as_being_written() -> None:
    reader, writer = os.pipe()
    assert not is_being_written(reader)
    os.close(reader)
    os.close(writer)


CHECK_UNTIL_GROWN = """
import os, signal, sys
from backupd.dropfolder.filesystem import is_being_written
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_RDONLY)
print("checking", flush=True)
while os.fstat(fd).st_size < 3000:
    is_being_written(fd)
print("grown", flush=True)
"""


def test_checking_a_file_disturbs_neither_its_writer_nor_the_daemon(root: Path) -> None:
    path = root / "r1.cfg"
    put(path, b"")
    with subprocess.Popen(
        [sys.executable, "-c", CHECK_UNTIL_GROWN, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "checking\n"
        for _ in range(3000):
            with path.open("ab", buffering=0) as file:
                file.write(b"x")
        assert process.stdout.readline() == "grown\n"
    assert process.returncode == 0


def test_the_daemon_ignores_the_signal_of_a_broken_lease(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:1/upload")
    daemon = stage.daemon().ready()
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1], 16)
    assert ignored & 1 << (signal.SIGIO - 1)
    os.kill(daemon.pid, signal.SIGIO)
    assert daemon.stop() == 0


def test_a_wrong_file_gets_a_new_name_if_a_third_file_has_its_old_one(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "r1.cfg"
    path.write_bytes(b"delivered")
    expected = fingerprint_of(os.stat(path))
    rename = moving.rename_no_replace
    calls: list[bytes] = []

    def rename_after_a_producer(source: int, name: bytes, target: int, new_name: bytes) -> None:
        calls.append(new_name)
        if len(calls) == 1:  # between the check and the rename
            (root / "new").write_bytes(b"second, not delivered")
            (root / "new").rename(path)
        rename(source, name, target, new_name)
        if len(calls) == 1:  # before it is moved back
            path.write_bytes(b"third")

    monkeypatch.setattr("backupd.dropfolder.move.rename_no_replace", rename_after_a_producer)
    with pytest.raises(FileChangedError):
        move(folder, b"r1.cfg", expected, b"sent", iter([b"r1.cfg"]), b".taken")

    assert list((root / "sent").iterdir()) == []
    assert path.read_bytes() == b"third"
    assert (root / "1-r1.cfg").read_bytes() == b"second, not delivered"
