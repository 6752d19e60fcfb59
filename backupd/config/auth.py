"""What a configuration holds about signing in."""

from typing import Literal, Self

from pydantic import Field, model_validator

from backupd.config import consistency
from backupd.config.faults import raise_all
from backupd.config.table import TableModel
from backupd.config.values import TlsPath, TokenUrl


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

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        raise_all("auth", consistency.auth_faults(self))
        return self
