"""What the type of a filesystem means."""

from __future__ import annotations

import pytest

from backupd.core.filesystems import default_stable_for, has_change_time, is_remote


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "unknown"])
def test_a_local_filesystem_needs_two_seconds_and_has_a_change_time(filesystem: str) -> None:
    assert not is_remote(filesystem)
    assert default_stable_for(filesystem) == 2.0
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
    assert default_stable_for(filesystem) > cache_seconds + 2


@pytest.mark.parametrize("filesystem", ["fuse.rclone", "fuse.sshfs", "vfat", "exfat"])
def test_some_filesystems_have_no_change_time(filesystem: str) -> None:
    assert not has_change_time(filesystem)
