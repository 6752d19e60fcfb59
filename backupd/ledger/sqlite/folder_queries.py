"""The part of the SQLite ledger about the folders of drops, and the archives that follow them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from backupd.core.drop_problem import NOT_MOVED
from backupd.core.folder_place import FolderPlace, follow_folders, label_of, name_of_left
from backupd.ledger.port import DropBacklog
from backupd.ledger.sqlite.connection import optional_time, storable_int

_WAITS = "(state = 'pending' OR disposition = 'due' OR (state = 'rejected' AND moved_to IS NOT NULL))"
"""An archive with a file that is still needed in its drop folder."""

_MOVE = "UPDATE archive SET drop_name = ?, changed = (SELECT number FROM change) WHERE drop_name = ?"

_RELEASE = (
    "UPDATE delivery SET state = 'pending', session = NULL, token = token + 1"
    " WHERE state = 'claimed' AND archive_id IN (SELECT id FROM archive WHERE drop_name = ?)"
)
"""The worker that has the claim would look for the file in the new folder of the drop."""

_BY_DROP = ("device", "expectation", "learned_drop")
"""Further tables with a column `drop_name`. The problems of drops are found again."""

_OPEN = """
    SELECT archive_id AS id FROM delivery WHERE state = 'pending'
    UNION SELECT archive_id FROM delivery WHERE state = 'claimed'
    UNION SELECT id FROM archive WHERE disposition = 'due'
"""


def assign_folders(db: sqlite3.Connection, places: Mapping[str, FolderPlace]) -> dict[str, FolderPlace]:
    """Have the archives follow their folders; see `Ledger.assign_folders`."""
    remembered = _places(db)
    moves = follow_folders(remembered, places)
    db.execute("UPDATE change SET number = number + 1")
    for old, new in moves.left.items():
        _forget_not_moved(db, old)
        if db.execute(f"{_MOVE} AND {_WAITS}", (new, old)).rowcount:
            db.execute(_RELEASE, (new,))
            _remember(db, new, remembered[old])
    # two steps, because drops may swap their names
    for old, new in moves.renamed.items():
        _forget_not_moved(db, old)
        if old in places:
            db.execute(_RELEASE, (old,))
        _rename(db, old, f"\0{new}")
    for old, new in moves.renamed.items():
        _rename(db, f"\0{new}", new)
        db.execute("DELETE FROM drop_folder WHERE drop_name = ?", (old,))
    for name, place in places.items():
        known = remembered.get(name)
        if place.filesystem is None and known is not None and known.path == place.path:
            continue  # it can't be reached now
        _remember(db, name, place)
    left = [name for name in pending_drops(db) if label_of(name) != name and label_of(name) in places]
    remembered = _places(db)
    return {name: remembered[name] for name in left}


def pending_drops(db: sqlite3.Connection) -> dict[str, DropBacklog]:
    """Return the drops with archives that wait for a delivery or a disposition."""
    rows = db.execute(
        "SELECT archive.drop_name, count(*), min(queued_at), path"  # noqa: S608 -- own clause
        f" FROM ({_OPEN}) AS open JOIN archive ON archive.id = open.id"
        " LEFT JOIN drop_folder ON drop_folder.drop_name = archive.drop_name"
        " GROUP BY archive.drop_name ORDER BY archive.drop_name"
    )
    return {name: DropBacklog(count, optional_time(oldest), path) for name, count, oldest, path in rows}


def earlier_names(db: sqlite3.Connection, drop: str) -> list[str]:
    """Return the names for the archives in the earlier folders of a drop."""
    first = name_of_left(drop, "")
    query = "SELECT drop_name FROM drop_folder WHERE drop_name >= ? AND drop_name < ?"
    return [row[0] for row in db.execute(query, (first, first[:-1] + ";"))]


def _places(db: sqlite3.Connection) -> dict[str, FolderPlace]:
    rows = db.execute("SELECT drop_name, path, device, inode FROM drop_folder ORDER BY drop_name")
    return {
        name: FolderPlace(path, *(None if number is None else int(number) for number in numbers))
        for name, path, *numbers in rows
    }


def _remember(db: sqlite3.Connection, name: str, place: FolderPlace) -> None:
    numbers = (None if number is None else storable_int(number) for number in (place.filesystem, place.inode))
    db.execute(
        "INSERT OR REPLACE INTO drop_folder (drop_name, path, device, inode) VALUES (?, ?, ?, ?)",
        (name, place.path, *numbers),
    )


def _rename(db: sqlite3.Connection, old: str, new: str) -> None:
    db.execute(_MOVE, (new, old))
    for table in _BY_DROP:
        db.execute(f"UPDATE OR REPLACE {table} SET drop_name = ? WHERE drop_name = ?", (new, old))  # noqa: S608


def _forget_not_moved(db: sqlite3.Connection, drop: str) -> None:
    """Delete the problems that the recorder finds again under the new name."""
    db.execute("DELETE FROM problem WHERE drop_name = ? AND reason = ?", (drop, NOT_MOVED))
