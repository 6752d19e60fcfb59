"""The tables and keys of a configuration, with their types, defaults and descriptions."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    model_validator,
)

from backupd.config.problems import ConfigFault, Place, expected, quoted
from backupd.config.types import (
    AbsolutePath,
    Bandwidth,
    CommandWord,
    ConnectTo,
    DeviceName,
    DeviceTemplate,
    DigestField,
    DigestSource,
    DropSubfolder,
    Duration,
    EventName,
    FieldName,
    FieldText,
    FilePattern,
    FreeSpace,
    HeaderName,
    HeaderText,
    HostName,
    IpAddress,
    LabelPattern,
    ListenAddress,
    Name,
    Percentage,
    Pin,
    PingUrl,
    PositiveDuration,
    ProxyUrl,
    Size,
    TextfilePath,
    TlsPath,
    TokenProxyUrl,
    TokenUrl,
    UrlTemplate,
    ValueSource,
)


class TableModel(BaseModel):
    """The base of all tables: immutable, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ExpectConfig(TableModel):
    """The `expect` table of a drop: how often each device is expected to send an archive."""

    every: PositiveDuration | None = Field(
        default=None,
        description="Time without an archive after which a device is overdue; not checked unless set.",
        examples=["26h"],
    )
    by: DeviceTemplate | None = Field(
        default=None,
        description="Template of the device name; the whole drop folder counts as one device unless set.",
        examples=["{device}"],
    )
    devices: tuple[DeviceName, ...] = Field(
        default=(),
        description="Devices expected from the start; others are expected after their first archive.",
        examples=[["sw1", "sw2"]],
    )


class AuthConfig(TableModel):
    """The `auth` table of a destination; each secret is in a file, which is read again at each use."""

    type: Literal["none", "basic", "bearer", "oauth2"] = Field(
        default="none", description="Authentication scheme; oauth2 uses the client credentials grant."
    )
    user: str = Field(default="", description="User name for basic.", examples=["ers-admin"])
    password_file: TlsPath | None = Field(
        default=None,
        description="File with the password for basic.",
        examples=["/etc/backupd/vault.password"],
    )
    token_file: TlsPath | None = Field(
        default=None, description="File with the token for bearer.", examples=["/etc/backupd/vault.token"]
    )
    token_url: TokenUrl = Field(
        default="",
        description="URL of the token endpoint for oauth2.",
        examples=["https://login.example.net/oauth2/token"],
    )
    client_id: str = Field(default="", description="Client ID for oauth2.", examples=["backupd"])
    client_secret_file: TlsPath | None = Field(
        default=None,
        description="File with the client secret for oauth2.",
        examples=["/etc/backupd/client.secret"],
    )
    secret_in: Literal["basic", "post"] = Field(
        default="basic",
        description="How the client secret is sent: by HTTP basic authentication, or in the POST form.",
    )
    scope: str = Field(default="", description="Scope to request for oauth2.")
    audience: str = Field(default="", description="Audience to request for oauth2.")
    resource: str = Field(default="", description="Resource to request for oauth2 (RFC 8707).")
    proxy: TokenProxyUrl = Field(
        default="",
        description='Proxy for the token endpoint, or "none"; that of the destination unless set.',
    )
    proxy_user: str = Field(default="", description="User name for that proxy.")
    proxy_password_file: TlsPath | None = Field(
        default=None,
        description="File with the password for that proxy.",
        examples=["/etc/backupd/login-proxy.password"],
    )
    ca: TlsPath | None = Field(
        default=None,
        description="PEM file with the CAs to trust for the token endpoint; the system's CAs unless set.",
        examples=["/etc/backupd/tls/login-ca.pem"],
    )
    cert: TlsPath | None = Field(
        default=None,
        description="PEM file with the client certificate for the token endpoint.",
        examples=["/etc/backupd/tls/login.pem"],
    )
    key: TlsPath | None = Field(
        default=None,
        description="PEM file with the private key of that certificate.",
        examples=["/etc/backupd/tls/login.key"],
    )
    key_password_file: TlsPath | None = Field(
        default=None,
        description="File with the password of that key; a line end after the password is ignored.",
        examples=["/etc/backupd/tls/login.key.password"],
    )


DigestAlgorithm = Literal["sha256", "sha512", "sha1", "md5", "blake2b"]
DigestEncoding = Literal["hex", "base64", "base64url"]
Priority = Literal["oldest", "smallest", "newest"]

Sorted = PlainSerializer(sorted, return_type=list[int], when_used="json")
HttpSuccess = Annotated[int, Field(strict=True, ge=200, le=299)]


class TimeoutConfig(TableModel):
    """The `timeout` table of a destination: time limits for the steps of a request."""

    connect: PositiveDuration = Field(
        default=timedelta(seconds=10), description="Longest time to connect, including the TLS handshake."
    )
    read: PositiveDuration = Field(
        default=timedelta(minutes=10),
        description="Longest wait for the response after the request was sent, and again for the rest of it.",
    )
    write: PositiveDuration = Field(
        default=timedelta(seconds=60),
        description="Longest wait until the destination accepts the next piece of the archive.",
    )


class ReceiptConfig(TableModel):
    """The `receipt` table of a destination: how the response states the digest of the stored archive."""

    digest: DigestSource = Field(
        default="body:/sha256",
        description='Position of the digest: "body:" and a JSON pointer, "header:" and a name, or "none".',
    )
    size: ValueSource = Field(
        default="",
        description="Position of the size in bytes, in the same form; empty if it is not stated.",
        examples=["body:/size"],
    )
    algorithm: DigestAlgorithm = Field(default="sha256", description="Algorithm of the digest.")
    encoding: DigestEncoding = Field(default="hex", description="Encoding of the digest.")
    prefix: int = Field(
        default=0,
        strict=True,
        ge=0,
        description="Number of leading characters of the digest that the response states; 0 for all.",
    )


class RetryConfig(TableModel):
    """The `retry` table of a destination: the waits between attempts, and when to give up."""

    initial: PositiveDuration = Field(
        default=timedelta(seconds=1),
        description="Longest wait before the first retry; it doubles with each further failure.",
    )
    max: PositiveDuration = Field(
        default=timedelta(minutes=5), description="Longest wait between two attempts."
    )
    give_up_after: PositiveDuration | None = Field(
        default=None,
        description="Age at which an undelivered archive is rejected; never unless set.",
        examples=["30d"],
    )


class TlsFiles(Protocol):
    """The keys that name the files of a TLS client, or of the metrics' server; each may be left out."""

    @property
    def ca(self) -> Path | None:
        """Return the PEM file of the authorities to trust; None for the system's."""
        ...

    @property
    def cert(self) -> Path | None:
        """Return the PEM file of the own certificate and its chain."""
        ...

    @property
    def key(self) -> Path | None:
        """Return the PEM file of the certificate's private key."""
        ...

    @property
    def key_password_file(self) -> Path | None:
        """Return the file with the password of the private key."""
        ...


DEFAULT_KIND = "http"


def _known_kind(kind: str) -> str:
    if kind not in DESTINATION_MODELS:
        raise expected(f"one of {', '.join(map(quoted, sorted(DESTINATION_MODELS)))}")
    return kind


class DestinationConfig(TableModel):
    """The keys of every kind of destination; a kind adds its own in a subclass.

    A table is validated with the model in `DESTINATION_MODELS` that its `kind` names. The properties and
    methods are the rest of the program's view of a destination, whatever its kind. A key of a kind that
    names a file has the type `TlsPath`: its value may then be the name of a systemd credential.
    """

    kind: Annotated[str, AfterValidator(_known_kind)] = Field(
        default=DEFAULT_KIND, description="Kind of destination; it decides which other keys exist."
    )
    priority: Priority = Field(default="oldest", description="Which pending archive is uploaded first.")
    workers: int = Field(
        default=2,
        strict=True,
        ge=1,
        le=64,
        description="Number of archives that are uploaded at the same time.",
    )
    retry: RetryConfig = Field(default_factory=RetryConfig, description="When a failed upload is retried.")

    @property
    def address(self) -> str:
        """Return the address of the destination as text for people, without any secret."""
        return self.kind

    @property
    def tls_files(self) -> TlsFiles | None:
        """Return the files to check, and to watch for renewals; None if the kind has no certificates."""
        return None

    @property
    def sign_in_tls_files(self) -> TlsFiles | None:
        """Return those of the connection to the token endpoint, in the table `auth`; None without one."""
        return None

    @property
    def has_digest_receipt(self) -> bool:
        """Return whether the destination states the digest of the content that it stored."""
        return True

    @property
    def can_query(self) -> bool:
        """Return whether the destination can be queried for an archive that was sent to it earlier."""
        return False

    def templates(self) -> Iterator[tuple[Place, str]]:
        """Yield each value that may hold placeholders, with the place of its key in the table."""
        yield from ()

    def faults(self) -> Iterator[ConfigFault]:
        """Yield each contradiction between the kind's own keys, with its place in the table."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _validate_by_kind(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls is not DestinationConfig or not isinstance(data, dict):
            return handler(data)
        kind = data.get("kind", DEFAULT_KIND)
        model = DESTINATION_MODELS.get(kind) if isinstance(kind, str) else None
        if model is None:  # the keys of an unknown kind are unknown, too
            return handler({"kind": kind})
        return model.model_validate(data)  # type: ignore[return-value]


class HttpDestinationConfig(DestinationConfig):
    """A destination of the kind `http`: an HTTP server to which archives are uploaded."""

    url: UrlTemplate = Field(
        description="URL to upload archives to; its path and query can contain placeholders.",
        examples=["https://vault.example.net/v1/upload"],
    )
    ca: TlsPath | None = Field(
        default=None,
        description="PEM file with the CAs to trust; the system's CAs unless set.",
        examples=["/etc/backupd/tls/ca.pem"],
    )
    cert: TlsPath | None = Field(
        default=None,
        description="PEM file with the client certificate, followed by its chain.",
        examples=["/etc/backupd/tls/client.pem"],
    )
    key: TlsPath | None = Field(
        default=None,
        description="PEM file with the private key of the client certificate.",
        examples=["/etc/backupd/tls/client.key"],
    )
    key_password_file: TlsPath | None = Field(
        default=None,
        description="File with the password of the private key; a line end after the password is ignored.",
        examples=["/etc/backupd/tls/client.key.password"],
    )
    method: Literal["POST", "PUT", "PATCH"] = Field(default="POST", description="HTTP method of the upload.")
    body: Literal["multipart", "raw"] = Field(
        default="multipart", description="Format of the request body; raw sends the archive itself."
    )
    create_folders: bool = Field(
        default=False,
        strict=True,
        description="Create missing folders of a WebDAV server by MKCOL; for PUT with a raw body.",
    )
    fields: dict[FieldName, FieldText] = Field(
        default_factory=dict,
        description="Additional form fields, sent before the archive; values can contain placeholders.",
        examples=[{"description": "Config backup {name}"}],
    )
    file_field: FieldName = Field(default="file", description="Form field of the archive.")
    digest_field: DigestField = Field(
        default="sha256", description="Form field of the digest; empty to send none."
    )
    digest_at: Literal["after", "before", "header"] = Field(
        default="after",
        description="Where the digest is sent; before and header ({digest}, Repr-Digest) read a file twice.",
    )
    headers: dict[HeaderName, HeaderText] = Field(
        default_factory=dict,
        description="Additional headers of each request; values can contain placeholders.",
        examples=[{"X-Backup-Source": "{host}"}],
    )
    header_files: dict[HeaderName, TlsPath] = Field(
        default_factory=dict,
        description="Additional headers with secret values, each of which is read from a file.",
        examples=[{"X-API-Key": "/etc/backupd/api.key"}],
    )
    query_url: UrlTemplate | None = Field(
        default=None,
        description="URL to query for the receipt of an archive if the response to its upload was lost.",
        examples=["https://vault.example.net/v1/upload/{digest}"],
    )
    on_duplicate: Literal["verify", "reject"] = Field(
        default="verify",
        description="Meaning of HTTP 409; verify: delivered if its receipt matches, reject: rejected.",
    )
    success: Annotated[frozenset[HttpSuccess], Sorted] = Field(
        default=frozenset({200, 201, 202, 204}),
        min_length=1,
        description="HTTP statuses with which the destination accepts an archive.",
    )
    timeout: TimeoutConfig = Field(
        default_factory=TimeoutConfig, description="Time limits for the steps of a request."
    )
    deadline: PositiveDuration | None = Field(
        default=None,
        description="Longest duration of a whole upload attempt; unlimited unless set.",
        examples=["6h"],
    )
    min_rate: Size = Field(
        default=1024,
        description="Abort an upload that is slower than this per second, over a minute; 0B disables this.",
    )
    bandwidth: Bandwidth | None = Field(
        default=None,
        description="Highest rate of all workers together, or a table of rates by the time of day.",
        examples=["2MB/s"],
    )
    http2: bool = Field(
        default=False, strict=True, description="Offer HTTP/2 to the destination; never used through a proxy."
    )
    proxy: ProxyUrl = Field(
        default="",
        description="URL of an HTTP proxy that supports CONNECT; proxies of the environment are not used.",
    )
    proxy_user: str = Field(default="", description="User name for the proxy.")
    proxy_password_file: TlsPath | None = Field(
        default=None,
        description="File with the password for the proxy.",
        examples=["/etc/backupd/proxy.password"],
    )
    local_address: IpAddress = Field(default="", description="IP address of this host to connect from.")
    connect_to: ConnectTo = Field(
        default="", description="Host and port to connect to instead of those in url."
    )
    server_name: HostName = Field(
        default="", description="Host name for SNI and certificate verification instead of the one in url."
    )
    connection_max_age: PositiveDuration = Field(
        default=timedelta(minutes=5),
        description="Age from which on a connection is not used again, so that a changed name is followed.",
    )
    pin_sha256: tuple[Pin, ...] = Field(
        default=(),
        description="SHA-256 pins of public keys; the destination's certificate must have one of these keys.",
    )
    tls_min: Literal["1.2", "1.3"] = Field(default="1.2", description="Lowest version of TLS to accept.")
    receipt: ReceiptConfig = Field(
        default_factory=ReceiptConfig, description="How the response states the digest of the stored archive."
    )
    auth: AuthConfig = Field(default_factory=AuthConfig, description="Authentication to the destination.")

    @property
    def address(self) -> str:
        """See `DestinationConfig.address`."""
        return self.url.partition("?")[0]

    @property
    def tls_files(self) -> TlsFiles:
        """See `DestinationConfig.tls_files`."""
        return self

    @property
    def sign_in_tls_files(self) -> TlsFiles | None:
        """See `DestinationConfig.sign_in_tls_files`."""
        return self.auth if self.auth.type == "oauth2" else None

    @property
    def has_digest_receipt(self) -> bool:
        """See `DestinationConfig.has_digest_receipt`."""
        return self.receipt.digest != "none"

    @property
    def can_query(self) -> bool:
        """See `DestinationConfig.can_query`."""
        return self.query_url is not None

    def templates(self) -> Iterator[tuple[Place, str]]:
        """See `DestinationConfig.templates`."""
        yield ("url",), self.url
        if self.query_url:
            yield ("query_url",), self.query_url
        for key, text in self.fields.items():
            yield ("fields", key), text
        for key, text in self.headers.items():
            yield ("headers", key), text


DESTINATION_MODELS: dict[str, type[DestinationConfig]] = {DEFAULT_KIND: HttpDestinationConfig}
"""The model of each kind of destination; `backupd.upload.registry` adds those of further kinds."""


def models_of(table: type[BaseModel]) -> tuple[type[BaseModel], ...]:
    """Return the models of a table: for destinations one for each kind, the default kind first."""
    return tuple(DESTINATION_MODELS.values()) if table is DestinationConfig else (table,)


LogFormat = Literal["auto", "json", "ecs", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]
Observer = Literal["auto", "inotify", "polling"]
OnDelivered = Literal["move", "delete", "keep"]
Inspect = Literal["off", "quick", "full"]
OnSuspicious = Literal["deliver", "reject"]
ChecksumFile = Literal["off", "auto", "required"]


class LogConfig(TableModel):
    """The `log` table: the format and level of the daemon's log."""

    format: LogFormat = Field(
        default="auto",
        description="Format of the log; auto: console on a terminal, else json; ecs: Elastic Common Schema.",
    )
    level: LogLevel = Field(
        default="info", description="Lowest level to log; debug also logs every line of a trouble that lasts."
    )


class HeartbeatConfig(TableModel):
    """The `heartbeat` table: a service that raises an alarm if the daemon's requests stay away."""

    ping_url: PingUrl | None = Field(
        default=None,
        description="URL to request with each heartbeat, of a service that warns if the requests stay away.",
        examples=["https://hc-ping.com/11111111-2222-3333-4444-555555555555"],
    )


NotificationEvent = Literal["problem", "rejected", "paused", "overdue", "certificate", "recovered"]


class NotifyConfig(TableModel):
    """A target of notifications: the URLs to send messages to, and which messages."""

    url_file: TlsPath = Field(
        description="File with the URLs for Apprise, one a line; lines that start with # are comments.",
        examples=["/etc/backupd/ops.urls"],
    )
    events: tuple[NotificationEvent, ...] = Field(
        default=get_args(NotificationEvent),
        min_length=1,
        description="Kinds of messages to send; recovered is the all-clear of each of the others.",
    )
    every: PositiveDuration = Field(
        default=timedelta(minutes=10),
        description="Shortest time between two messages of one kind; a message has all news since the last.",
    )
    remind_every: PositiveDuration = Field(
        default=timedelta(hours=24), description="Interval of the reminders of a trouble that lasts."
    )


class MetricsConfig(TableModel):
    """The `metrics` table: metrics for Prometheus, by HTTP and as a file."""

    listen: ListenAddress | None = Field(
        default=None,
        description="Address and port of the page for people, /metrics, /healthz and /readyz.",
        examples=["127.0.0.1:9184"],
    )
    textfile: TextfilePath | None = Field(
        default=None,
        description="File for the textfile collector of node_exporter; not written unless set.",
        examples=["/var/lib/node_exporter/backupd.prom"],
    )
    ca: TlsPath | None = Field(
        default=None,
        description="PEM file with the CAs of clients; each client needs a certificate of one of them.",
        examples=["/etc/backupd/tls/metrics-ca.pem"],
    )
    cert: TlsPath | None = Field(
        default=None,
        description="PEM file with the server certificate; plain HTTP is for loopback addresses only.",
        examples=["/etc/backupd/tls/metrics.pem"],
    )
    key: TlsPath | None = Field(
        default=None,
        description="PEM file with the private key of that certificate.",
        examples=["/etc/backupd/tls/metrics.key"],
    )
    key_password_file: TlsPath | None = Field(
        default=None,
        description="File with the password of that key; a line end after the password is ignored.",
        examples=["/etc/backupd/tls/metrics.key.password"],
    )

    @property
    def is_enabled(self) -> bool:
        """Return whether metrics are served or written."""
        return self.listen is not None or self.textfile is not None


class DropConfig(TableModel):
    """A drop: the folder to watch, the files that are archives, and their handling after the delivery."""

    path: AbsolutePath = Field(
        description="Absolute path of the folder to watch.", examples=["/srv/backups/switches"]
    )
    destinations: tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        description="Destinations to deliver each archive to; all of them unless set.",
        examples=[["vault"]],
    )
    include: tuple[FilePattern, ...] = Field(
        default=("*",),
        min_length=1,
        description="Name patterns of files that are archives.",
    )
    exclude: tuple[FilePattern, ...] = Field(
        default=(),
        description="Name patterns of files and folders to ignore, besides temporary and hidden ones.",
    )
    recursive: bool = Field(
        default=True,
        strict=True,
        description="Watch subfolders too; otherwise each one with files in it is a problem.",
    )
    observer: Observer = Field(
        default="auto",
        description="How changes are detected; auto uses polling where other hosts can write, else inotify.",
    )
    stable_for: Duration | None = Field(
        default=None,
        description="How long a file must be unchanged before its upload; 2s, more on network filesystems.",
        examples=["2s"],
    )
    rescan_every: PositiveDuration = Field(
        default=timedelta(seconds=60), description="Interval between two scans of the whole folder."
    )
    min_size: Size = Field(default=1, description="Ignore files smaller than this.")
    max_size: Size | None = Field(
        default=None, description="Ignore files larger than this; unlimited unless set.", examples=["10GiB"]
    )
    on_delivered: OnDelivered = Field(
        default="move",
        description="Action for an archive after its delivery to every destination is verified.",
    )
    sent_dir: DropSubfolder = Field(
        default="sent",
        description="Folder for delivered archives, relative to path and on the same filesystem.",
    )
    rejected_dir: DropSubfolder = Field(
        default="rejected",
        description="Folder for rejected archives, relative to path and on the same filesystem.",
    )
    keep_sent_for: PositiveDuration | None = Field(
        default=None,
        description="Age at which archives in sent_dir are removed; never unless set.",
        examples=["90d"],
    )
    keep_sent_last: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        default=None,
        description="Number of latest archives to keep per device (of label_pattern) or folder, at any age.",
        examples=[10],
    )
    min_free: FreeSpace | None = Field(
        default=None,
        description="Size or percentage to keep free by removing the oldest archives from sent_dir.",
        examples=["5%"],
    )
    inspect: Inspect = Field(
        default="quick",
        description="Check archives before upload; quick reads gzip and zstd, and the ends of others.",
    )
    inspect_grace: Duration = Field(
        default=timedelta(minutes=10),
        description="How long an archive that fails a check is held back, as it may still be completed.",
    )
    on_suspicious: OnSuspicious = Field(
        default="deliver",
        description="Action after that for an archive that looks truncated; deliver lists it as a problem.",
    )
    checksum_file: ChecksumFile = Field(
        default="off",
        description="Verify archives by their checksum files; auto does so for archives that have one.",
    )
    label_pattern: LabelPattern | None = Field(
        default=None,
        description="Regular expression for the relative path; its named groups become placeholders.",
        examples=["(?P<device>[^/]+)/.*"],
    )
    size_alarm: Percentage | None = Field(
        default=None,
        description="Warn if an archive's size differs by this much from the device's recent archives.",
        examples=["50%"],
    )
    expect: ExpectConfig = Field(
        default_factory=ExpectConfig, description="How often each device is expected to send an archive."
    )


class Config(TableModel):
    """The whole configuration."""

    state_dir: AbsolutePath = Field(
        default=Path("/var/lib/backupd"),
        description="Folder of the ledger; $STATE_DIRECTORY is used if that is set and this is not.",
    )
    shutdown_grace: Duration = Field(
        default=timedelta(seconds=30), description="How long running uploads may continue after SIGTERM."
    )
    heartbeat_every: PositiveDuration = Field(
        default=timedelta(seconds=60), description="Interval between two heartbeat log events."
    )
    keep_history_for: PositiveDuration = Field(
        default=timedelta(days=400),
        description="How long the ledger keeps the history of completed archives.",
    )
    certificate_warning: PositiveDuration = Field(
        default=timedelta(days=14),
        description="A certificate with less time left is a warning; at most a quarter of its lifetime.",
    )
    certificate_critical: PositiveDuration = Field(
        default=timedelta(days=3),
        description="A certificate with less time left is critical; at most a tenth of its lifetime.",
    )
    on_event: tuple[CommandWord, ...] = Field(
        default=(),
        description="Command and its arguments, run without a shell for each event, which it reads as JSON.",
        examples=[["/usr/local/bin/hook"]],
    )
    on_event_timeout: PositiveDuration = Field(
        default=timedelta(seconds=10), description="Time limit of that command; it is killed afterwards."
    )
    on_events: tuple[EventName, ...] = Field(
        default=(),
        description="Names of the events to run it for; all except those of the level debug unless set.",
        examples=[["archive.rejected", "destination.paused"]],
    )
    log: LogConfig = Field(default_factory=LogConfig, description="Log of the daemon.")
    heartbeat: HeartbeatConfig = Field(
        default_factory=HeartbeatConfig, description="Signs of life for a service that expects them."
    )
    notify: dict[Name, NotifyConfig] = Field(
        default_factory=dict,
        description="Targets of notifications, each with a name of your choice; needs the extra `notify`.",
    )
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="Metrics for Prometheus.")
    drop: dict[Name, DropConfig] = Field(
        min_length=1, description="Drop folders, each with a name of your choice."
    )
    destination: dict[Name, DestinationConfig] = Field(
        min_length=1, description="Destinations, each with a name of your choice."
    )
