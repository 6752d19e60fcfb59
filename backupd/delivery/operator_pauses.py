"""The pauses of destinations and drops that people have requested, as the workers see them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from backupd.core.snapshot import OperatorPause


class OperatorPauses:
    """The pauses that are active now; safe to use from several threads.

    No upload to a paused destination begins, and none from a paused drop. Files are noticed and queued as
    ever, and an upload under way is finished.
    """

    def __init__(self) -> None:
        self._pauses: dict[tuple[str, str], OperatorPause] = {}

    def of(self, kind: str, name: str) -> OperatorPause | None:
        """Return the active pause of a destination or a drop; `kind` is `destination` or `drop`."""
        pause = self._pauses.get((kind, name))
        return None if pause is None or pause.is_over(datetime.now(UTC)) else pause

    def active(self) -> list[OperatorPause]:
        """Return all active pauses."""
        now = datetime.now(UTC)
        return [each for each in self._pauses.values() if not each.is_over(now)]

    def replace(self, pauses: Iterable[OperatorPause]) -> tuple[list[OperatorPause], list[OperatorPause]]:
        """Replace all pauses; return those that began or changed, and those that ended."""
        now, before = datetime.now(UTC), self._pauses
        self._pauses = {(each.kind, each.name): each for each in pauses if not each.is_over(now)}
        began = [each for key, each in self._pauses.items() if before.get(key) != each]
        return began, [each for key, each in before.items() if key not in self._pauses]
