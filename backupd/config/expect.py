"""What a configuration says of who sends archives, and how often."""

from pydantic import Field

from backupd.config.quantities import PositiveDuration
from backupd.config.table import TableModel
from backupd.config.values import DeviceName, DeviceTemplate


class ExpectConfig(TableModel):
    """How often each device is to send an archive."""

    every: PositiveDuration | None = Field(
        default=None,
        description="A device of which nothing came for longer is overdue; none is unless given.",
        examples=["26h"],
    )
    by: DeviceTemplate | None = Field(
        default=None,
        description="Template of the device's name; the whole folder is one device unless given.",
        examples=["{device}"],
    )
    devices: tuple[DeviceName, ...] = Field(
        default=(),
        description="Devices that are expected from the start; others are from their first archive on.",
        examples=[["sw1", "sw2"]],
    )
