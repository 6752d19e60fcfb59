"""What a type of filesystem, such as `ext4` or `fuse.sshfs`, means for the files on it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from backupd.core.mountinfo import MountEntry

_LOCAL_STABLE_SECONDS = 2.0

_REMOTE_MARGIN_SECONDS = 5.0
"""Seconds by which a file must be unchanged for longer than its attributes may be cached."""

_CACHE_SECONDS = {
    "9p": 1.0,
    "afs": 1.0,
    "beegfs": 1.0,
    "ceph": 1.0,
    "cifs": 1.0,  # actimeo
    "coda": 1.0,
    "davfs": 60.0,  # dir_refresh
    "fuse.blobfuse2": 120.0,
    "fuse.gcsfuse": 60.0,
    "fuse.goofys": 60.0,
    "fuse.rclone": 300.0,  # --dir-cache-time
    "fuse.s3fs": 900.0,  # stat_cache_expire
    "fuse.sshfs": 20.0,  # dcache_timeout
    "glusterfs": 1.0,
    "gpfs": 1.0,
    "lustre": 1.0,
    "ncpfs": 1.0,
    "nfs": 60.0,  # acregmax
    "nfs4": 60.0,
    "orangefs": 1.0,
    "prl_fs": 1.0,
    "smb3": 1.0,
    "smbfs": 1.0,
    "vboxsf": 1.0,
    "virtiofs": 1.0,
    "vmhgfs": 1.0,
}
"""Seconds for which each network filesystem caches size and times of a file, with its default options."""

_HIDDEN_CACHE_OPTIONS = {
    "davfs": "dir_refresh",
    "fuse.blobfuse2": "attribute_cache.timeout-sec",
    "fuse.gcsfuse": "metadata-cache.ttl-secs",
    "fuse.goofys": "--stat-cache-ttl",
    "fuse.rclone": "--dir-cache-time",
    "fuse.s3fs": "stat_cache_expire",
    "fuse.sshfs": "dcache_timeout",
}
"""The setting of the cache time of filesystems that do not have it among the mount options of the kernel."""

_OTHER_FUSE_CACHE_SECONDS = 1.0
"""The default of libfuse."""

_WITHOUT_CHANGE_TIME = frozenset(
    [
        "davfs",
        "exfat",
        "fuse.blobfuse2",
        "fuse.curlftpfs",
        "fuse.gcsfuse",
        "fuse.goofys",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "msdos",
        "vfat",
    ]
)


_CACHE_OPTION = re.compile(r"\b(?:acregmax|actimeo)=(\d+)")
"""The mount option of NFS and SMB with the seconds for which attributes are cached, if not the default."""


def is_remote(filesystem: str) -> bool:
    """Return whether other hosts can write to a filesystem of this type without an inotify event here."""
    return filesystem in _CACHE_SECONDS or filesystem.split(".", maxsplit=1)[0] in ("fuse", "fuseblk")


def default_stable_for(mounts: Iterable[MountEntry] = ()) -> float:
    """Return the seconds for which a file must be unchanged, unless configured otherwise.

    `mounts` are those that the files are on. A file that another host writes looks unchanged here for as long
    as its attributes are cached.
    """
    return max(
        (_cache_seconds(mount) + _REMOTE_MARGIN_SECONDS for mount in mounts if is_remote(mount.filesystem)),
        default=_LOCAL_STABLE_SECONDS,
    )


def _cache_seconds(mount: MountEntry) -> float:
    if configured := _CACHE_OPTION.search(mount.options):
        return float(configured[1])
    return _CACHE_SECONDS.get(mount.filesystem, _OTHER_FUSE_CACHE_SECONDS)


def hidden_cache_option(filesystem: str) -> str | None:
    """Return the setting of the cache time that the kernel does not show; None if there is none."""
    return _HIDDEN_CACHE_OPTIONS.get(filesystem)


def has_change_time(filesystem: str) -> bool:
    """Return whether a change time is stored that a program cannot set back."""
    return filesystem not in _WITHOUT_CHANGE_TIME
