"""What a configuration holds: frozen, complete, and consistent once it exists."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from backupd.config.types import (
    AbsolutePath,
    Bandwidth,
    ConnectTo,
    DeviceName,
    DeviceTemplate,
    DigestField,
    DigestSource,
    DropSubfolder,
    Duration,
    FieldName,
    FieldText,
    FilePattern,
    FreeSpace,
    HeaderName,
    HeaderText,
    HostName,
    IpAddress,
    LabelPattern,
    Name,
    Percentage,
    Pin,
    PositiveDuration,
    ProxyUrl,
    Size,
    TlsPath,
    TokenUrl,
    UrlTemplate,
    ValueSource,
)


class TableModel(BaseModel):
    """A table of the configuration: nothing unknown in it, nothing to change in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


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


class AuthConfig(TableModel):
    """How to sign in; every secret is a file, read anew when it is needed."""

    type: Literal["none", "basic", "bearer", "oauth2"] = Field(
        default="none", description="Scheme; oauth2 is the client credentials grant."
    )
    user: str = Field(default="", description="User name, for basic.", examples=["ers-admin"])
    password_file: TlsPath | None = Field(
        default=None, description="File of the password, for basic.", examples=["/etc/backupd/vault.password"]
    )
    token_file: TlsPath | None = Field(
        default=None, description="File of the token, for bearer.", examples=["/etc/backupd/vault.token"]
    )
    token_url: TokenUrl = Field(
        default="",
        description="Address of the token endpoint, for oauth2.",
        examples=["https://login.example.net/oauth2/token"],
    )
    client_id: str = Field(default="", description="Client id, for oauth2.", examples=["backupd"])
    client_secret_file: TlsPath | None = Field(
        default=None,
        description="File of the client secret, for oauth2.",
        examples=["/etc/backupd/client.secret"],
    )
    secret_in: Literal["basic", "post"] = Field(
        default="basic", description="Where the client secret goes: basic authentication, or the form."
    )
    scope: str = Field(default="", description="Scope to ask for, for oauth2.")
    audience: str = Field(default="", description="Audience to ask for, for oauth2.")
    ca: TlsPath | None = Field(
        default=None,
        description="PEM file of the authorities to trust at the token endpoint; the system's unless given.",
        examples=["/etc/backupd/tls/login-ca.pem"],
    )
    cert: TlsPath | None = Field(
        default=None,
        description="PEM file of the client certificate for the token endpoint.",
        examples=["/etc/backupd/tls/login.pem"],
    )
    key: TlsPath | None = Field(
        default=None,
        description="PEM file of that certificate's private key.",
        examples=["/etc/backupd/tls/login.key"],
    )
    key_password_file: TlsPath | None = Field(
        default=None,
        description="File whose content, less the line end, unlocks that key.",
        examples=["/etc/backupd/tls/login.key.password"],
    )


DigestAlgorithm = Literal["sha256", "sha512", "sha1", "md5", "blake2b"]
DigestEncoding = Literal["hex", "base64", "base64url"]
Priority = Literal["oldest", "smallest", "newest"]

Sorted = PlainSerializer(sorted, return_type=list[int], when_used="json")
HttpSuccess = Annotated[int, Field(strict=True, ge=200, le=299)]


class TimeoutConfig(TableModel):
    """How long the single steps of a request may take."""

    connect: PositiveDuration = Field(
        default=timedelta(seconds=10), description="Longest wait for a connection and its TLS handshake."
    )
    read: PositiveDuration = Field(
        default=timedelta(minutes=10),
        description="Longest wait for the answer once everything is sent, and again for its end.",
    )
    write: PositiveDuration = Field(
        default=timedelta(seconds=60), description="Longest wait for one piece of the archive to be taken."
    )
    pool: PositiveDuration = Field(
        default=timedelta(seconds=10), description="Longest wait for a free connection."
    )


class ReceiptConfig(TableModel):
    """Where the destination's answer states the digest of what it stored."""

    digest: DigestSource = Field(
        default="body:/sha256",
        description='Place of the digest: "body:" and a JSON pointer, "header:" and a name, or "none".',
    )
    size: ValueSource = Field(
        default="",
        description="Place of the size in bytes, written like that of the digest; empty if it is not stated.",
        examples=["body:/size"],
    )
    algorithm: DigestAlgorithm = Field(default="sha256", description="Algorithm of the digest.")
    encoding: DigestEncoding = Field(default="hex", description="How the digest is written.")
    prefix: int = Field(
        default=0,
        strict=True,
        ge=0,
        description="How many leading characters of the digest are reported; 0 is all of them.",
    )


class RetryConfig(TableModel):
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


class DestinationConfig(TableModel):
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
    method: Literal["POST", "PUT", "PATCH"] = Field(default="POST", description="Method of the request.")
    body: Literal["multipart", "raw"] = Field(
        default="multipart", description="Form of the request's body; raw is the archive itself."
    )
    fields: dict[FieldName, FieldText] = Field(
        default_factory=dict,
        description="Further form fields, sent before the archive; values may hold placeholders.",
        examples=[{"description": "Config backup {name}"}],
    )
    file_field: FieldName = Field(default="file", description="Form field of the archive itself.")
    digest_field: DigestField = Field(
        default="sha256", description="Form field of the digest; empty for none."
    )
    digest_at: Literal["after", "before", "header"] = Field(
        default="after",
        description="Where the digest goes; before, and header ({digest}, Repr-Digest), read the file twice.",
    )
    headers: dict[HeaderName, HeaderText] = Field(
        default_factory=dict,
        description="Further headers of each request; values may hold placeholders.",
        examples=[{"X-Backup-Source": "{host}"}],
    )
    header_files: dict[HeaderName, TlsPath] = Field(
        default_factory=dict,
        description="Further headers whose values are secrets, each in a file.",
        examples=[{"X-API-Key": "/etc/backupd/api.key"}],
    )
    query_url: UrlTemplate | None = Field(
        default=None,
        description="Address that is asked for the receipt of an archive whose answer was lost.",
        examples=["https://vault.example.net/v1/upload/{digest}"],
    )
    on_duplicate: Literal["verify", "reject"] = Field(
        default="verify",
        description="What a 409 means: delivered if its receipt matches, or always a rejection.",
    )
    priority: Priority = Field(default="oldest", description="Which pending archive goes first.")
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
    bandwidth: Bandwidth | None = Field(
        default=None,
        description="Most bytes per second of all workers together, or a table of rates by time of day.",
        examples=["2MB/s"],
    )
    http2: bool = Field(default=False, strict=True, description="Whether HTTP/2 is offered, proxies aside.")
    proxy: ProxyUrl = Field(
        default="", description="HTTP proxy to CONNECT through; the environment's proxies are not used."
    )
    proxy_user: str = Field(default="", description="User name for the proxy.")
    proxy_password_file: TlsPath | None = Field(
        default=None,
        description="File of the password for the proxy.",
        examples=["/etc/backupd/proxy.password"],
    )
    local_address: IpAddress = Field(default="", description="Address of this host to connect from.")
    connect_to: ConnectTo = Field(
        default="", description="Host and port to connect to instead of those in the url."
    )
    server_name: HostName = Field(
        default="", description="Name to ask for and to expect in the certificate instead of the url's host."
    )
    pin_sha256: tuple[Pin, ...] = Field(
        default=(), description="SHA-256 of the endpoint's public keys, one of which it has to show."
    )
    tls_min: Literal["1.2", "1.3"] = Field(default="1.2", description="Least version of TLS.")
    receipt: ReceiptConfig = Field(
        default_factory=ReceiptConfig, description="Where the answer states the digest of what was stored."
    )
    retry: RetryConfig = Field(default_factory=RetryConfig, description="When a failed attempt is repeated.")
    auth: AuthConfig = Field(default_factory=AuthConfig, description="How to sign in.")


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
