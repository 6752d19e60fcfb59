"""Asking destinations for what they were sent."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING

from backupd.core.errors import UsageError
from backupd.core.labels import variables
from backupd.core.model import Deferred, Delivered, Digest, Rejected
from backupd.core.names import as_text
from backupd.core.policy import Reason
from backupd.ledger.records import ArchiveRecord, DeliveryRecord

if TYPE_CHECKING:
    from backupd.cli.audit import Finding
    from backupd.config.models import Config


class Remote:
    """Asks each destination with a `query_url` over one connection; raises UsageError where none has one."""

    def __init__(self, config: Config) -> None:
        from backupd.assembly import make_uploader  # noqa: PLC0415
        from backupd.upload.line import Abort  # noqa: PLC0415

        able = {name: d for name, d in config.destination.items() if d.query_url}
        if not able:
            raise UsageError("no destination has a `query_url`", "give it one, or leave --remote out")
        self._uploaders = {name: make_uploader(destination, Abort()) for name, destination in able.items()}
        self._patterns = {
            name: re.compile(drop.label_pattern) if drop.label_pattern else None
            for name, drop in config.drop.items()
        }
        self._host = socket.gethostname()

    def __call__(self, record: ArchiveRecord, delivery: DeliveryRecord) -> Finding | None:
        """Return what the destination of a delivery says of it; None where it can't be asked such things."""
        from backupd.cli.audit import Finding, Verdict  # noqa: PLC0415
        from backupd.upload.port import Cargo  # noqa: PLC0415

        uploader = self._uploaders.get(delivery.destination)
        if uploader is None or delivery.digest is None:
            return None
        archive = record.archive
        values = variables(archive, self._host, self._patterns[archive.drop])
        name = archive.relpath.rpartition(b"/")[2]
        cargo = Cargo(delivery.id, name, -1, archive.fingerprint, values)
        verdict, detail = Verdict.OK, ""
        match uploader.ask(cargo, Digest.parse(delivery.digest)):
            case Delivered():
                pass
            case Deferred(reason=reason, error=detail) | Rejected(reason=reason, error=detail):
                differs = reason in (Reason.MISMATCH, Reason.UNVERIFIED)
                verdict = Verdict.CHANGED if differs else Verdict.UNREADABLE
            case _:
                verdict, detail = Verdict.MISSING, "the destination no longer has it"
        return Finding(
            archive.id, archive.drop, as_text(archive.relpath), verdict, detail, delivery.destination
        )

    def close(self) -> None:
        """Give the connections back."""
        for uploader in self._uploaders.values():
            uploader.close()
