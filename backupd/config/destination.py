"""What a configuration holds about an endpoint that archives are uploaded to."""

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, PlainSerializer, model_validator

from backupd.config import consistency
from backupd.config.auth import AuthConfig
from backupd.config.faults import raise_all
from backupd.config.quantities import PositiveDuration, Size
from backupd.config.rates import Bandwidth
from backupd.config.table import TableModel
from backupd.config.values import (
    ConnectTo,
    DigestField,
    DigestSource,
    FieldName,
    FieldText,
    HeaderName,
    HeaderText,
    HostName,
    IpAddress,
    Pin,
    ProxyUrl,
    TlsPath,
    UrlTemplate,
    ValueSource,
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

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("receipt", consistency.receipt_faults(self))
        return self


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

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("retry", consistency.retry_faults(self))
        return self


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

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("destination", consistency.destination_faults(self))
        return self
