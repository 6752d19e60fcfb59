"""The devices that sent archives before the ledger was created, by their receipt files."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from backupd.core.devices import Device
from backupd.core.model import Archive, fingerprint_of
from backupd.core.policy import REJECTED_BY_INTAKE
from backupd.delivery.receipt_file import MAX_CLOCK_SKEW, SkippedFiles, StoredFolder
from backupd.dropfolder.drop import Drop

DeviceOf = Callable[[Archive], str | None]
"""Returns the device that sent an archive, None if it is unknown."""


def past_devices(
    drop: Drop, device_of: DeviceOf, skipped: SkippedFiles, should_continue: Callable[[], bool]
) -> list[Device] | None:
    """Return the devices of the archives in `sent_dir` and `rejected_dir`; None without a `sent_dir`.

    Files that cannot be used now are added to `skipped`. `should_continue` is called before each file.
    """
    devices: dict[str, Device] = {}
    if not drop.tracks_devices:
        return []
    try:
        if not stat.S_ISDIR(drop.folder.stat(drop.sent_dir).st_mode):
            return None
    except OSError:
        return None  # nothing was sent yet, or its filesystem is not mounted
    latest = datetime.now(UTC) + MAX_CLOCK_SKEW
    for stored in (StoredFolder.of_sent(drop), StoredFolder.of_rejected(drop)):
        for archive in _received_archives(stored, skipped, should_continue):
            name, at = device_of(archive), archive.queued_at
            if at > latest:
                skipped.add("with a time in the future", archive.relpath)
            if name is None:
                continue
            known_at, last_at, archives = at, at, 0
            if name in devices:
                before = devices[name]
                known_at, last_at, archives = before.known_at, before.last_at or at, before.archives
            devices[name] = Device(drop.name, name, min(known_at, at), max(last_at, at), archives + 1)
    return [*devices.values()]


def _received_archives(
    stored: StoredFolder, skipped: SkippedFiles, should_continue: Callable[[], bool]
) -> Iterator[Archive]:
    """Yield the archives in a folder that arrived whole, by their receipt files."""
    for file in stored.files(skipped.add_unreadable, should_continue):
        if file.status is None or file.receipt_status is None:
            continue
        try:
            found = stored.receipt(file.relpath, file.status)
        except OSError as error:
            skipped.add_unreadable(file.relpath, error)
            continue
        if found and not {d.reason for d in found.receipt.deliveries} & REJECTED_BY_INTAKE:
            fingerprint = fingerprint_of(file.status)
            yield Archive(0, stored.drop, found.original_path, fingerprint, found.receipt.queued_at)
