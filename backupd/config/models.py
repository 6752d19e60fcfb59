"""What a configuration holds: frozen, complete, and consistent once it exists."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from backupd.config import consistency
from backupd.config.destination import DestinationConfig
from backupd.config.expect import ExpectConfig
from backupd.config.faults import raise_all
from backupd.config.free_space import FreeSpace
from backupd.config.quantities import Duration, Percentage, PositiveDuration, Size
from backupd.config.table import TableModel
from backupd.config.values import AbsolutePath, DropSubfolder, FilePattern, LabelPattern, Name

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]
Observer = Literal["auto", "inotify", "polling"]
OnDelivered = Literal["move", "delete", "keep"]
Inspect = Literal["off", "quick", "full"]
ChecksumFile = Literal["off", "auto", "required"]

USUAL_NAMES = (
    *("*.tar", "*.tgz", "*.tbz", "*.tbz2", "*.txz", "*.tzst", "*.gz", "*.bz2", "*.xz", "*.zst", "*.lz4"),
    *("*.zip", "*.7z", "*.rar", "*.gpg", "*.pgp", "*.age", "*.enc", "*.aes"),
    *("*.cfg", "*.conf", "*.config", "*.confg", "*-confg", "*.cnf", "*.set", "*.rsc", "*.txt"),
    *("*.xml", "*.json", "*.yaml", "*.yml", "*.sql", "*.dump", "*.dat"),
    *("*.bak", "*.backup", "*.bkp", "*.bkf", "*.ucs", "*.scf", "*.sns", "*.unf", "*.exp"),
)


class LogConfig(TableModel):
    """How the daemon writes its log."""

    format: LogFormat = Field(
        default="auto",
        description="Form of the log; auto writes for people on a terminal and JSON everywhere else.",
    )
    level: LogLevel = Field(default="info", description="Least severity that is written.")


class DropConfig(TableModel):
    """A folder in which archives appear, and what becomes of them."""

    path: AbsolutePath = Field(
        description="Folder to watch, as an absolute path.", examples=["/srv/backups/switches"]
    )
    destinations: tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        description="Destinations that each archive goes to; every one of them unless given.",
        examples=[["vault"]],
    )
    include: tuple[FilePattern, ...] = Field(
        default=USUAL_NAMES, min_length=1, description="Patterns of the names of archives."
    )
    exclude: tuple[FilePattern, ...] = Field(
        default=(),
        description="Patterns of names to leave alone; temporary names and dotfiles always are.",
    )
    recursive: bool = Field(default=True, strict=True, description="Whether subfolders are watched too.")
    observer: Observer = Field(
        default="auto",
        description="How changes are noticed; auto polls where the filesystem reports no remote writers.",
    )
    stable_for: Duration = Field(
        default=timedelta(seconds=2), description="How long a file must stay unchanged before it is sent."
    )
    rescan_every: PositiveDuration = Field(
        default=timedelta(seconds=60), description="How often the whole folder is looked through."
    )
    min_size: Size = Field(default=1, description="Smaller files are left alone.")
    max_size: Size | None = Field(
        default=None, description="Larger files are left alone; no limit unless given.", examples=["10GiB"]
    )
    on_delivered: OnDelivered = Field(
        default="move", description="What becomes of an archive that every destination has verified."
    )
    sent_dir: DropSubfolder = Field(
        default="sent", description="Folder for delivered archives, relative to path, on the same filesystem."
    )
    rejected_dir: DropSubfolder = Field(
        default="rejected",
        description="Folder for rejected archives, relative to path, on the same filesystem.",
    )
    keep_sent_for: PositiveDuration | None = Field(
        default=None,
        description="Age at which archives in sent_dir are removed; never unless given.",
        examples=["90d"],
    )
    keep_sent_last: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        default=None,
        description="How many are kept of each device (group of label_pattern) or folder, however old.",
        examples=[10],
    )
    min_free: FreeSpace | None = Field(
        default=None,
        description="Size or percentage to keep free by removing from sent_dir, the oldest first.",
        examples=["5%"],
    )
    inspect: Inspect = Field(
        default="off",
        description="Whether archives are looked into first; quick their ends, full every byte of them.",
    )
    inspect_grace: Duration = Field(
        default=timedelta(minutes=10),
        description="How long an archive that is found wanting must stay unchanged before it is rejected.",
    )
    checksum_file: ChecksumFile = Field(
        default="off",
        description="Whether a checksum file beside an archive is heeded; auto where there is one.",
    )
    label_pattern: LabelPattern | None = Field(
        default=None,
        description="Regular expression on the relative path whose named groups become placeholders.",
        examples=["(?P<device>[^/]+)/.*"],
    )
    size_alarm: Percentage | None = Field(
        default=None,
        description="Say so of an archive that is so much larger or smaller than its device's last ones.",
        examples=["50%"],
    )
    expect: ExpectConfig = Field(
        default_factory=ExpectConfig, description="How often each device is to send an archive."
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("drop", consistency.drop_faults(self))
        return self


class Config(TableModel):
    """The whole configuration of a daemon."""

    state_dir: AbsolutePath = Field(
        default=Path("/var/lib/backupd"),
        description="Folder of the ledger; $STATE_DIRECTORY, where that is set, unless given.",
    )
    shutdown_grace: Duration = Field(
        default=timedelta(seconds=30), description="How long running uploads may go on after SIGTERM."
    )
    heartbeat_every: PositiveDuration = Field(
        default=timedelta(seconds=60), description="How often the daemon logs that it is alive."
    )
    keep_history_for: PositiveDuration = Field(
        default=timedelta(days=400), description="How long the ledger remembers archives that are done with."
    )
    log: LogConfig = Field(default_factory=LogConfig, description="How the daemon writes its log.")
    drop: dict[Name, DropConfig] = Field(min_length=1, description="Drop folders by name.")
    destination: dict[Name, DestinationConfig] = Field(min_length=1, description="Destinations by name.")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("configuration", consistency.config_faults(self))
        return self
