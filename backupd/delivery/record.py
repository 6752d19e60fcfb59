"""What is written beside an archive that was put away, and what is believed of it when it is read again."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError

from backupd.core.model import DIGEST_BYTES, Archive, DeliveryState
from backupd.core.names import LARGEST_RECORD, as_text
from backupd.core.policy import Reason
from backupd.core.step import archive_state
from backupd.ledger.port import Ending, Settled

_DIGEST = "|".join(f"{algorithm}:[0-9a-f]{{{2 * size}}}" for algorithm, size in DIGEST_BYTES.items())

_Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Text = Annotated[str, StringConstraints(max_length=8 * 1024)]
_Digest = Annotated[str, StringConstraints(pattern=f"^({_DIGEST})$")]
_Id = Annotated[str, StringConstraints(pattern="^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
_Time = Annotated[AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC))]


class _Delivery(BaseModel):
    model_config = ConfigDict(strict=True)

    destination: _Name
    delivery_id: _Id
    state: DeliveryState
    ended_at: _Time
    digest: _Digest | None
    verified: bool | None
    http_status: Annotated[int, Field(ge=100, le=999)] | None
    reason: Reason | None
    error: _Text | None
    receipt: _Text | None


class Record(BaseModel):
    """What a record tells; whoever may write in the folder may have written it."""

    model_config = ConfigDict(strict=True)

    archive: _Name
    drop: _Name
    size: int
    digest: _Digest | None
    admitted_at: _Time
    deliveries: Annotated[list[_Delivery], FailFast(), Field(min_length=1, max_length=64)]

    @property
    def state(self) -> DeliveryState:
        """Return what the deliveries make of the archive."""
        return archive_state([delivery.state for delivery in self.deliveries])

    @property
    def ended_at(self) -> datetime:
        """Return when all was over, not before the admission, however the clock was set meanwhile."""
        return max(self.admitted_at, *(delivery.ended_at for delivery in self.deliveries))

    def settled(self, archive: Archive) -> Settled:
        """Return how the deliveries of an archive ended, which was announced then."""
        endings = tuple(
            Ending(
                d.delivery_id,
                d.destination,
                d.state,
                d.ended_at,
                d.digest,
                d.verified,
                d.http_status,
                d.reason,
                d.error,
                d.receipt,
            )
            for d in self.deliveries
        )
        return Settled(archive, self.state, self.digest, endings, announced=True)


def written(one: Settled) -> bytes:
    """Return the content of the record of an archive."""
    archive = one.archive
    fields = {
        "archive": as_text(archive.relpath),
        "drop": archive.drop,
        "size": archive.fingerprint.size,
        "digest": one.digest,
        "admitted_at": archive.admitted_at.isoformat(),
        "deliveries": [
            {
                "destination": ending.destination,
                "delivery_id": ending.delivery_id,
                "state": ending.state,
                "ended_at": ending.ended_at.isoformat(),
                "digest": ending.digest,
                "verified": ending.verified,
                "http_status": ending.http_status,
                "reason": ending.reason,
                "error": ending.error,
                "receipt": ending.receipt,
            }
            for ending in one.endings
        ],
    }
    return (json.dumps(fields, indent=2) + "\n").encode("ascii")


def read(content: bytes) -> Record | None:
    """Return what a record tells; None where it is none, or tells what no archive can come to.

    What was delivered has a digest: without one nothing could be shown of it.
    """
    if len(content) > LARGEST_RECORD:
        return None
    try:
        record = Record.model_validate_json(content)
    except ValidationError:
        return None
    delivered = [d for d in record.deliveries if d.state is DeliveryState.DELIVERED]
    proved = all(d.digest for d in delivered) and (record.digest or not delivered)
    return record if proved else None
