"""Parsing the kernel's list of mounted filesystems."""

from __future__ import annotations

import pytest

from backupd.core.mountinfo import (
    MountEntry,
    filesystem_at,
    mounts_within,
    parse_mountinfo,
    path_on_device,
)

MOUNTINFO = rb"""21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /proc rw,nosuid - proc proc rw
30 21 0:40 / /srv rw,relatime shared:2 master:1 - xfs /dev/sdb1 rw
31 30 0:41 / /srv/nas rw - nfs4 nas:/export rw
32 30 0:42 / /srv/two\040words\134\011x rw - cifs //nas/share rw
33 30 0:43 / /srv/over rw - ext4 /dev/sdc1 rw
34 33 0:44 / /srv/over rw - fuse.sshfs host:/ rw
35 30 0:45 / /srv/nasty rw - btrfs /dev/sdd1 rw
"""


def test_an_entry_has_mount_point_type_and_device() -> None:
    assert parse_mountinfo(MOUNTINFO)[2:4] == [
        MountEntry(b"/srv", "xfs", "0:40", options="rw"),
        MountEntry(b"/srv/nas", "nfs4", "0:41", options="rw"),
    ]


@pytest.mark.parametrize(
    ("escaped", "mount_point"),
    [
        (rb"/a\040b", b"/a b"),
        (rb"/a\011b\012c", b"/a\tb\nc"),
        (rb"/a\134040", rb"/a\040"),
        (rb"/a\777", b"/a\xff"),
        (b"/a\rb", b"/a\rb"),
        (b"/\xff\xfe", b"/\xff\xfe"),
        ("/Zürich".encode(), "/Zürich".encode()),
    ],
)
def test_a_mount_point_is_unescaped_to_the_bytes_of_its_path(escaped: bytes, mount_point: bytes) -> None:
    (entry,) = parse_mountinfo(b"22 21 0:5 / " + escaped + b" rw - proc proc rw\n")
    assert entry.mount_point == mount_point


@pytest.mark.parametrize("line", [b"", b"\n\n", b"22 21 0:5 / /proc rw", b"22 21 0:5 - proc", b"garbage"])
def test_a_line_in_another_format_is_skipped(line: bytes) -> None:
    assert parse_mountinfo(line) == []
    assert len(parse_mountinfo(line + b"\n" + MOUNTINFO)) == 8


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        (b"/", "ext4"),
        (b"/home/x", "ext4"),
        (b"/srv", "xfs"),
        (b"/srv/drop", "xfs"),
        (b"/srv/nas", "nfs4"),
        (b"/srv/nas/drop/r1", "nfs4"),
        (b"/srv/nas2", "xfs"),
        (b"/srv/nasty/drop", "btrfs"),
        (b"/srv/two words\\\tx/drop", "cifs"),
        (b"/srv/over/drop", "fuse.sshfs"),
    ],
)
def test_a_path_is_on_the_innermost_mount_and_of_two_at_one_place_on_the_last(
    path: bytes, filesystem: str
) -> None:
    assert filesystem_at(path, parse_mountinfo(MOUNTINFO)) == filesystem


def test_without_mounts_the_filesystem_is_unknown() -> None:
    assert filesystem_at(b"/srv", []) == "unknown"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (b"/srv/a/x", ("8:1", b"/srv/a/x")),
        (b"/mnt/bound", ("8:1", b"/srv/a")),
        (b"/mnt/bound/x", ("8:1", b"/srv/a/x")),
        (b"/mnt/boundary", ("8:1", b"/mnt/boundary")),
        (b"/mnt/disk", ("8:2", b"/")),
        (b"/mnt/disk/x", ("8:2", b"/x")),
        (b"/", ("8:1", b"/")),
    ],
)
def test_a_path_through_a_bind_mount_is_that_of_the_directory_itself(
    path: bytes, place: tuple[str, bytes]
) -> None:
    entries = parse_mountinfo(
        b"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        b"2 1 8:1 /srv/a /mnt/bound rw - ext4 /dev/sda1 rw\n"
        b"3 1 8:2 / /mnt/disk rw - xfs /dev/sdb1 rw\n"
    )
    assert path_on_device(path, entries) == place


def test_a_path_without_a_mount_entry_is_on_no_known_device() -> None:
    assert path_on_device(b"/srv", []) is None


def test_the_mounts_within_a_folder_are_its_own_and_those_below() -> None:
    entries = parse_mountinfo(MOUNTINFO)

    def within(path: bytes) -> list[bytes]:
        return [entry.mount_point for entry in mounts_within(path, entries)]

    assert within(b"/srv/nas/drop") == [b"/srv/nas"]
    assert within(b"/srv") == [b"/srv", *(entry.mount_point for entry in entries[3:])]
    assert within(b"/srv/na") == [b"/srv"]
    assert mounts_within(b"/srv", []) == []
