"""What a configuration holds: frozen, complete, and consistent once it exists."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from backupd.config import consistency
from backupd.config.faults import raise_all
from backupd.config.quantities import Duration, PositiveDuration, Size
from backupd.config.values import (
    AbsolutePath,
    DigestField,
    DigestSource,
    DropSubfolder,
    FieldName,
    FieldText,
    FilePattern,
    HeaderName,
    HeaderText,
    LabelPattern,
    Name,
    TlsPath,
    UrlTemplate,
)

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]
Observer = Literal["auto", "inotify", "polling"]
OnDelivered = Literal["move", "delete", "keep"]
DigestAlgorithm = Literal["sha256", "sha512", "sha1", "md5"]
DigestEncoding = Literal["hex", "base64", "base64url"]

USUAL_NAMES = (
    *("*.tar", "*.tgz", "*.tbz", "*.tbz2", "*.txz", "*.tzst", "*.gz", "*.bz2", "*.xz", "*.zst", "*.lz4"),
    *("*.zip", "*.7z", "*.rar", "*.gpg", "*.pgp", "*.age", "*.enc", "*.aes"),
    *("*.cfg", "*.conf", "*.config", "*.confg", "*-confg", "*.cnf", "*.set", "*.rsc", "*.txt"),
    *("*.xml", "*.json", "*.yaml", "*.yml", "*.sql", "*.dump", "*.dat"),
    *("*.bak", "*.backup", "*.bkp", "*.bkf", "*.ucs", "*.scf", "*.sns", "*.unf", "*.exp"),
)

Sorted = PlainSerializer(sorted, return_type=list[int], when_used="json")
HttpSuccess = Annotated[int, Field(strict=True, ge=200, le=299)]


class _Table(BaseModel):
    """A table of the configuration: nothing unknown in it, nothing to change in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class LogConfig(_Table):
    """How the daemon writes its log."""

    format: LogFormat = Field(
        default="auto",
        description="Form of the log; auto writes for people on a terminal and JSON everywhere else.",
    )
    level: LogLevel = Field(default="info", description="Least severity that is written.")


class DropConfig(_Table):
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
    label_pattern: LabelPattern | None = Field(
        default=None,
        description="Regular expression on the relative path whose named groups become placeholders.",
        examples=["(?P<device>[^/]+)/.*"],
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("drop", consistency.drop_faults(self))
        return self


class TimeoutConfig(_Table):
    """How long the single steps of a request may take."""

    connect: PositiveDuration = Field(
        default=timedelta(seconds=10), description="Longest wait for a connection and its TLS handshake."
    )
    read: PositiveDuration = Field(
        default=timedelta(minutes=10), description="Longest wait for the answer once everything is sent."
    )
    write: PositiveDuration = Field(
        default=timedelta(seconds=60), description="Longest wait for one piece of the archive to be taken."
    )
    pool: PositiveDuration = Field(
        default=timedelta(seconds=10), description="Longest wait for a free connection."
    )


class ReceiptConfig(_Table):
    """Where the destination's answer states the digest of what it stored."""

    digest: DigestSource = Field(
        default="body:/sha256",
        description='Place of the digest: "body:" and a JSON pointer, "header:" and a name, or "none".',
    )
    algorithm: DigestAlgorithm = Field(default="sha256", description="Algorithm of the digest.")
    encoding: DigestEncoding = Field(default="hex", description="How the digest is written.")
    prefix: int = Field(
        default=0,
        strict=True,
        ge=0,
        description="How many leading characters of the digest are reported; 0 is all of them.",
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("receipt", consistency.receipt_faults(self))
        return self


class RetryConfig(_Table):
    """How long to wait between attempts, and for how long to go on."""

    initial: PositiveDuration = Field(
        default=timedelta(seconds=1), description="Wait before the second attempt; it grows from there."
    )
    max: PositiveDuration = Field(
        default=timedelta(minutes=5), description="Longest wait between two attempts."
    )
    give_up_after: PositiveDuration | None = Field(
        default=None,
        description="Age at which an undelivered archive is rejected; never unless given.",
        examples=["30d"],
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("retry", consistency.retry_faults(self))
        return self


class DestinationConfig(_Table):
    """An endpoint that archives are uploaded to."""

    url: UrlTemplate = Field(
        description="Address that archives are posted to; its path and query may hold placeholders.",
        examples=["https://vault.example.net/v1/upload"],
    )
    ca: TlsPath | None = Field(
        default=None,
        description="PEM file of the authorities to trust; the system's own unless given.",
        examples=["/etc/backupd/tls/ca.pem"],
    )
    cert: TlsPath | None = Field(
        default=None,
        description="PEM file of the client certificate, followed by its chain.",
        examples=["/etc/backupd/tls/client.pem"],
    )
    key: TlsPath | None = Field(
        default=None,
        description="PEM file of the client certificate's private key.",
        examples=["/etc/backupd/tls/client.key"],
    )
    key_password_file: TlsPath | None = Field(
        default=None,
        description="File whose content, less the line end, unlocks the private key.",
        examples=["/etc/backupd/tls/client.key.password"],
    )
    fields: dict[FieldName, FieldText] = Field(
        default_factory=dict,
        description="Further form fields, sent before the archive; values may hold placeholders.",
        examples=[{"description": "Config backup {name}"}],
    )
    file_field: FieldName = Field(default="file", description="Form field of the archive itself.")
    digest_field: DigestField = Field(
        default="sha256", description="Form field of the digest, sent after the archive; empty for none."
    )
    headers: dict[HeaderName, HeaderText] = Field(
        default_factory=dict,
        description="Further headers of each request; values may hold placeholders.",
        examples=[{"X-Backup-Source": "{host}"}],
    )
    success: Annotated[frozenset[HttpSuccess], Sorted] = Field(
        default=frozenset({200, 201, 202, 204}),
        min_length=1,
        description="Statuses with which the destination accepts an archive.",
    )
    workers: int = Field(
        default=2, strict=True, ge=1, le=64, description="How many archives are uploaded at the same time."
    )
    timeout: TimeoutConfig = Field(
        default_factory=TimeoutConfig, description="How long the single steps of a request may take."
    )
    deadline: PositiveDuration | None = Field(
        default=None,
        description="Longest duration of a whole attempt; no limit unless given.",
        examples=["6h"],
    )
    min_rate: Size = Field(
        default=1024,
        description="Bytes per second, over a minute, below which an attempt is given up; 0B never does.",
    )
    http2: bool = Field(default=False, strict=True, description="Whether HTTP/2 is offered.")
    receipt: ReceiptConfig = Field(
        default_factory=ReceiptConfig, description="Where the answer states the digest of what was stored."
    )
    retry: RetryConfig = Field(default_factory=RetryConfig, description="When a failed attempt is repeated.")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("destination", consistency.destination_faults(self))
        return self


class Config(_Table):
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
    log: LogConfig = Field(default_factory=LogConfig, description="How the daemon writes its log.")
    drop: dict[Name, DropConfig] = Field(min_length=1, description="Drop folders by name.")
    destination: dict[Name, DestinationConfig] = Field(min_length=1, description="Destinations by name.")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("configuration", consistency.config_faults(self))
        return self
