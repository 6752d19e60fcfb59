"""What the type of a filesystem means."""

from __future__ import annotations

import pytest

from backupd.core.filesystems import default_stable_for, has_change_time, hidden_cache_option, is_remote
from backupd.core.mountinfo import MountEntry


def a_mount(filesystem: str, options: str = "rw") -> MountEntry:
    return MountEntry(b"/srv", filesystem, "0:40", options=options)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "unknown"])
def test_a_local_filesystem_needs_two_seconds_and_has_a_change_time(filesystem: str) -> None:
    assert not is_remote(filesystem)
    assert default_stable_for([a_mount(filesystem)]) == 2.0
    assert has_change_time(filesystem)


@pytest.mark.parametrize(
    ("filesystem", "cache_seconds"),
    [
        ("fuse.rclone", 300),
        ("fuse.sshfs", 20),
        ("nfs4", 60),
        ("nfs", 60),
        ("cifs", 1),
        ("smb3", 1),
        ("fuse", 1),
    ],
)
def test_a_file_on_a_network_filesystem_waits_for_longer_than_its_attributes_are_cached(
    filesystem: str, cache_seconds: float
) -> None:
    assert default_stable_for([a_mount(filesystem)]) > cache_seconds + 2


def test_only_the_cache_time_of_user_space_filesystems_is_hidden() -> None:
    assert hidden_cache_option("fuse.rclone") == "--dir-cache-time"
    assert hidden_cache_option("nfs4") is None


@pytest.mark.parametrize("filesystem", ["fuse.rclone", "fuse.sshfs", "vfat", "exfat"])
def test_some_filesystems_have_no_change_time(filesystem: str) -> None:
    assert not has_change_time(filesystem)


@pytest.mark.parametrize(
    ("filesystem", "options", "cache_seconds"),
    [
        ("nfs4", "rw,vers=4.2,acregmin=3,acregmax=600,acdirmin=600,hard", 600),
        ("nfs", "rw,acregmax=10", 10),
        ("cifs", "rw,actimeo=120", 120),
        ("cifs", "rw,acregmax=30,acdirmax=60,closetimeo=1", 30),
        ("nfs4", "rw,acdirmax=600", 60),
    ],
)
def test_a_cache_time_among_the_mount_options_counts_instead_of_the_default(
    filesystem: str, options: str, cache_seconds: float
) -> None:
    assert cache_seconds + 2 < default_stable_for([a_mount(filesystem, options)]) < cache_seconds + 10


def test_the_slowest_of_several_mounts_decides() -> None:
    mounts = [a_mount("ext4"), a_mount("fuse.rclone"), a_mount("cifs")]
    assert default_stable_for(mounts) > 300
    assert default_stable_for([]) == 2.0
