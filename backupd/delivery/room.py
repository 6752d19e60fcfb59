"""Whether the disks of drop folders have the room that is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupd.core.keeping import Order
from backupd.drop.folder import DropFolder
from backupd.ops import events
from backupd.ops.log import EventLog


@dataclass(frozen=True, slots=True)
class Shortage:
    """A disk with too little room, and the drops that are to give some; sizes are bytes."""

    device: int
    drops: tuple[str, ...]
    path: str
    free: int
    needed: int

    @property
    def missing(self) -> int:
        """Return how much is to become free."""
        return self.needed - self.free


class Room:
    """Measures the disks, and tells of those that are full: once, and again while it lasts."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._told: dict[int, datetime] = {}

    def shortages(self, drops: Mapping[str, tuple[DropFolder, Order]]) -> list[Shortage]:
        """Return the disks on which less is free than the drops there ask for."""
        disks: dict[int, dict[str, tuple[DropFolder, Order]]] = {}
        for name, (folder, order) in drops.items():
            if order.min_free:
                disks.setdefault(os.fstat(folder.fileno()).st_dev, {})[name] = folder, order
        found = [short for device, members in disks.items() if (short := _measured(device, members))]
        lacking = {short.device for short in found}
        self._told = {device: when for device, when in self._told.items() if device in lacking}
        return found

    def tell(self, short: Shortage, now: datetime, every: timedelta) -> None:
        """Tell that a disk stays short of room."""
        told = self._told.get(short.device)
        if told is not None and timedelta(0) <= now - told < every:  # the clock may have been set back
            return
        self._told[short.device] = now
        self._log.emit(
            events.DISK_LOW,
            drop=short.drops[0],
            path=short.path,
            free_bytes=short.free,
            min_free_bytes=short.needed,
            error="less than `min_free` is free, and no sent archive is known that could be removed",
            hint="make room on that filesystem, or enlarge it: once it is full, backups can't be dropped",
        )


def _measured(device: int, members: Mapping[str, tuple[DropFolder, Order]]) -> Shortage | None:
    folder = next(iter(members.values()))[0]
    try:
        status = os.fstatvfs(folder.fileno())
    except OSError:
        return None  # the intake tells of a folder that can't be used
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    needs = {name: o.min_free.of(total) for name, (_, o) in members.items() if o.min_free}
    lacking = tuple(name for name, need in needs.items() if need > free)
    return Shortage(device, lacking, folder.path, free, max(needs.values())) if lacking else None
