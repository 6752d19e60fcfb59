"""Where drop folders are, and which archives follow them when the configuration is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FolderPlace:
    """The path of a drop folder, without links, and the numbers of its filesystem and inode.

    The path is as configured if the folder does not answer. `filesystem` is None if the folder can't be
    reached. `inode` is None then, too, and for the root of a mount, which has the same one on each disk. A
    boot may change the number of a filesystem, so that the numbers decide only if the path is another one.
    """

    path: str
    filesystem: int | None = None
    inode: int | None = None

    def has_numbers_of(self, other: FolderPlace) -> bool:
        """Return whether both are known to be one directory, whatever their paths are."""
        numbers = self.filesystem, self.inode
        return self.inode is not None and numbers == (other.filesystem, other.inode)

    def is_same(self, other: FolderPlace) -> bool:
        """Return whether both are one folder: by the path, or by the numbers of the directory."""
        return self.path == other.path or self.has_numbers_of(other)


@dataclass(frozen=True, slots=True)
class FolderMoves:
    """How the archives follow their folders; both map the name of a drop to the one that replaces it.

    All archives of the `renamed` drops get the new name. A drop in `left` has another folder now: the
    archives that wait in the old one get the name that `name_of_left` returns.
    """

    renamed: Mapping[str, str]
    left: Mapping[str, str]


def follow_folders(
    remembered: Mapping[str, FolderPlace], configured: Mapping[str, FolderPlace]
) -> FolderMoves:
    """Compare the folders of drops before and after a change; both are by the name of the drop.

    `remembered` may also have drops that were removed, and names from `name_of_left`.
    """

    def is_kept(name: str) -> bool:
        return name in configured and name in remembered and remembered[name].is_same(configured[name])

    renamed: dict[str, str] = {}
    for name, place in configured.items():
        if is_kept(name):
            continue
        free = {old: p for old, p in remembered.items() if old not in renamed and not is_kept(old)}
        old = next((old for old, p in free.items() if p.path == place.path), None)
        old = old or next((old for old, p in free.items() if p.has_numbers_of(place)), None)
        if old is not None:
            renamed[old] = name
    left = {
        name: name_of_left(name, remembered[name].path)
        for name in configured
        if name in remembered and name not in renamed and not is_kept(name)
    }
    return FolderMoves(renamed, left)


def name_of_left(name: str, path: str) -> str:
    """Return the name for the archives in an earlier folder of a drop; no drop can be called so."""
    return f"{name}:{path}"


def label_of(name: str) -> str:
    """Return the name of the drop in a name from `name_of_left`; any other name as it is."""
    return name.partition(":")[0]
