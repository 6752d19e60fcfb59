"""The deliveries that a person names: by an id, an archive's number, a file's name or path, or a digest."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from backupd.config.models import Config
from backupd.core.errors import UsageError
from backupd.core.model import DIGEST_BYTES, DeliveryState
from backupd.core.names import as_text
from backupd.core.units import local_time
from backupd.ledger.history import DeliveryRecord, History, Search, Selector

_MAX_MATCHES = 1000
"""Deliveries that are read for a name; a device may send the same one each hour."""

_MAX_CANDIDATES = 10
"""Deliveries that an error lists."""

_DIGEST = re.compile(rf"(?:(?:{'|'.join(DIGEST_BYTES)}):[0-9a-f]+|[0-9a-f]{{8,}})", re.IGNORECASE)

SELECTOR_HELP = (
    "A delivery's id or the first characters of it, @ and an archive's number, a file's name or path, or a"
    " digest or the first 8 characters of it."
)

Selected = Annotated[str, typer.Argument(metavar="ID|@N|FILE|DIGEST", help=SELECTOR_HELP)]
SomeSelected = Annotated[list[str] | None, typer.Argument(metavar="ID|@N|FILE|DIGEST", help=SELECTOR_HELP)]


@dataclass(frozen=True, slots=True)
class Selection:
    """The archive that a person named; `delivery` is None unless one of its deliveries was named by its id.

    `deliveries` are those of the archive. `older` counts the older archives of the same file that match.
    """

    archive_id: int
    delivery: DeliveryRecord | None
    deliveries: list[DeliveryRecord]
    older: int


def parse_selector(config: Config, text: str) -> Selector:
    """Return what a text can mean; raises UsageError if it can mean nothing."""
    if re.fullmatch(r"@[0-9]{1,17}", text):
        return Selector(archive_id=int(text[1:]))
    if not text or text.startswith("@"):
        raise UsageError(f"expected @ and the number of an archive, got {text!r}", "such as `show @17`")
    digest = text.lower() if _DIGEST.fullmatch(text) else ""
    if text.startswith(("/", "./", "../")):
        drop, path = _drop_of(config, text)
        return Selector(path=os.fsencode(path), drop=drop)
    return Selector(id_prefix=text.lower(), path=os.fsencode(text), digest=digest)


def select(history: History, config: Config, text: str, states: Collection[DeliveryState] = ()) -> Selection:
    """Return the archive that a text names: of several of the same file the newest one.

    With `states`, deliveries in other states are left out, unless no other one matches. Raises UsageError if
    there is none, or if it is not clear which one is meant; its message lists them.
    """
    selector = parse_selector(config, text)
    found = history.find(Search(selectors=[selector]), _MAX_MATCHES)
    found = [record for record in found if record.state in states] or found
    if not found:
        raise UsageError(
            f"no delivery matches {text!r}",
            "`backupd list` shows the deliveries, `backupd list --problems` the files without one",
        )
    by_id = [r for r in found if selector.id_prefix and r.id.startswith(selector.id_prefix)]
    others = _exact(selector, [r for r in found if r not in by_id])
    if len(by_id) == 1 and not others:
        return _selection(history, by_id[0].archive.id, by_id[0], 0)
    files = {(record.archive.drop, record.archive.relpath) for record in others}
    if by_id or len(files) > 1:
        raise UsageError(_ambiguity(text, by_id, others), "give the id of one of them")
    archives = sorted({record.archive.id for record in others})
    return _selection(history, archives[-1], None, len(archives) - 1)


def _drop_of(config: Config, text: str) -> tuple[str, str]:
    """Return the drop that a path leads into, and the path relative to its folder."""
    path = Path(os.path.abspath(text))  # `resolve` would access the folders, which may hang
    for name, drop in config.drop.items():
        if path.is_relative_to(drop.path) and path != drop.path:
            return name, str(path.relative_to(drop.path))
    folders = ", ".join(str(drop.path) for drop in config.drop.values())
    raise UsageError(f"{text}: it is not in a drop folder", f"there are: {folders}")


def _exact(selector: Selector, records: list[DeliveryRecord]) -> list[DeliveryRecord]:
    """Return the records with exactly the path of the selector if there are any, else all."""
    exact = [r for r in records if selector.path and r.archive.relpath == selector.path]
    return exact or records


def _selection(history: History, archive_id: int, delivery: DeliveryRecord | None, older: int) -> Selection:
    return Selection(archive_id, delivery, history.deliveries_of(archive_id), older)


def _ambiguity(text: str, by_id: list[DeliveryRecord], others: list[DeliveryRecord]) -> str:
    """Return an error with a line for each delivery; of each file in `others`, only for the newest one."""
    newest: dict[tuple[str, bytes, str], DeliveryRecord] = {}
    for record in others:
        newest.setdefault((record.archive.drop, record.archive.relpath, record.destination), record)
    shown = [*by_id, *newest.values()]
    lines = [
        f"  {r.id[:8]}  {local_time(r.archive.queued_at)}  {r.state:10}  {r.archive.drop}:"
        f" {as_text(r.archive.relpath)} → {r.destination}"
        for r in shown[:_MAX_CANDIDATES]
    ]
    if len(shown) > _MAX_CANDIDATES:
        lines.append(f"  and {len(shown) - _MAX_CANDIDATES} more: `backupd list {text}`")
    return "\n".join((f"{text!r} matches several deliveries:", *lines))
