"""Which archives follow their folder when the configuration of the drops is changed."""

from __future__ import annotations

import pytest

from backupd.core.folder_place import FolderPlace, follow_folders, label_of, name_of_left

A, B, C = FolderPlace("/a", 8, 11), FolderPlace("/b", 8, 12), FolderPlace("/c", 8, 13)
A_MOVED = FolderPlace("/moved", 8, 11)
A_UNREACHABLE = FolderPlace("/a")


@pytest.mark.parametrize(
    ("remembered", "configured", "renamed", "left"),
    [
        pytest.param({}, {"x": A}, {}, {}, id="a new drop"),
        pytest.param({"x": A}, {"x": A}, {}, {}, id="no change"),
        pytest.param({"x": A}, {"x": A_UNREACHABLE}, {}, {}, id="a folder that can't be reached"),
        pytest.param({"x": A}, {"x": FolderPlace("/a", 9, 99)}, {}, {}, id="another filesystem on the path"),
        pytest.param({"x": A}, {"x": A_MOVED}, {}, {}, id="a moved folder"),
        pytest.param({"x": A}, {}, {}, {}, id="a removed drop"),
        pytest.param({"x": A}, {"y": A}, {"x": "y"}, {}, id="a new name"),
        pytest.param({"x": A}, {"y": A_MOVED}, {"x": "y"}, {}, id="a new name of a moved folder"),
        pytest.param({"x": A}, {"y": A_UNREACHABLE}, {"x": "y"}, {}, id="a new name of a path"),
        pytest.param({"x": A, "y": B}, {"x": B, "y": A}, {"x": "y", "y": "x"}, {}, id="swapped names"),
        pytest.param({"x": A, "y": B}, {"x": C, "y": A}, {"x": "y"}, {"y": "y:/b"}, id="names move on"),
        pytest.param({"x": A}, {"x": B}, {}, {"x": "x:/a"}, id="another path"),
        pytest.param(
            {"x": FolderPlace("/a", 8)},
            {"x": FolderPlace("/b", 8)},
            {},
            {"x": "x:/a"},
            id="the root of another disk with the same number",
        ),
        pytest.param(
            {"x": FolderPlace("/a", 8)}, {"y": FolderPlace("/b", 8)}, {}, {}, id="its root for a new name"
        ),
        pytest.param({"x": B, "x:/a": A}, {"x": A}, {"x:/a": "x"}, {"x": "x:/b"}, id="the path before"),
        pytest.param(
            {"x": B, "x:/a": A}, {"x": B, "y": A}, {"x:/a": "y"}, {}, id="a drop for the path before"
        ),
        pytest.param(
            {"x": FolderPlace("/a", 8, 2), "y": FolderPlace("/b", 9, 2)},
            {"x": FolderPlace("/a", 9, 2), "y": FolderPlace("/b", 8, 2)},
            {},
            {},
            id="a boot swaps the numbers of two disks",
        ),
    ],
)
def test_archives_follow_their_folder(
    remembered: dict[str, FolderPlace],
    configured: dict[str, FolderPlace],
    renamed: dict[str, str],
    left: dict[str, str],
) -> None:
    moves = follow_folders(remembered, configured)
    assert (moves.renamed, moves.left) == (renamed, left)


def test_a_name_of_an_earlier_folder_has_the_name_of_the_drop() -> None:
    assert label_of(name_of_left("switches", "/srv/a:b")) == label_of("switches") == "switches"
