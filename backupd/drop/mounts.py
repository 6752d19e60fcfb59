"""What kind of filesystem a folder lies on."""

from __future__ import annotations

import os
import re

_NETWORK = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "orangefs",
        "prl_fs",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "vmhgfs",
    ]
)


def filesystem_of(path: str, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Return the type of the filesystem that holds a path, such as `ext4`; proc_pid_mountinfo(5)."""
    wanted = os.path.realpath(path)
    best, kind = "", "unknown"
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            point = _unescape(left.split(" ")[4])
            inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):  # of mounts over one another the last one counts
                best, kind = point, right.split(" ")[0]
    return kind


def is_remote(filesystem: str) -> bool:
    """Tell whether others can write to a filesystem without this kernel noticing."""
    return filesystem in _NETWORK or filesystem.split(".", maxsplit=1)[0] in ("fuse", "fuseblk")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)
