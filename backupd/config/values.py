"""The kinds of single values that a configuration holds, each with its own check."""

import base64
import ipaddress
import os
import posixpath
import re
import warnings
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, StringConstraints, WithJsonSchema

from backupd.config.faults import expected, quoted, refused
from backupd.core.template import Template, TemplateError

NAME_PATTERN: Final = "^[A-Za-z0-9][A-Za-z0-9._-]*$"

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_HEADER_TEXT: Final = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?")
_OUR_HEADERS: Final = frozenset(
    {"content-length", "content-type", "host", "idempotency-key", "transfer-encoding"}
)
_CREDENTIAL: Final = re.compile(r"auth|cookie|credential|key|passw|secret|signature|token", re.IGNORECASE)
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_HOST_OR_IP: Final = re.compile(r"[A-Za-z0-9:](?:[A-Za-z0-9.:-]{0,251}[A-Za-z0-9:])?")
_POINTER: Final = re.compile(r"(?:/(?:[^~/]|~[01])*)+")  # RFC 6901, section 3


def names_a_credential(name: str) -> bool:
    """Tell whether what is called `name` is likely to be a secret."""
    return _CREDENTIAL.search(name) is not None


def _absolute(value: object, what: str) -> Path:
    if isinstance(value, Path):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise expected(what)
    return Path(posixpath.normpath(value))


def _absolute_path(value: object) -> Path:
    return _absolute(value, "an absolute path")


def _tls_path(value: object) -> Path:
    return _absolute(value, "an absolute path, or the name of a file in $CREDENTIALS_DIRECTORY")


def _subfolder(value: str) -> str:
    parts = value.split("/")
    if value.startswith("/") or ".." in parts or "\0" in value or posixpath.normpath(value) == ".":
        raise expected('a folder below the drop folder, without ".."')
    return posixpath.normpath(value)


def _file_pattern(value: str) -> str:
    if not value or "\0" in value:
        raise expected('a pattern such as "*.tar.gz"')
    return value


def _label_pattern(value: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python merely warns of today means something else tomorrow
            pattern = re.compile(value)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        raise refused(f"expected a regular expression: {error}") from None
    if not pattern.groupindex:
        raise expected('a named group such as "(?P<device>[^/]+)"')
    return value


def _template(value: str) -> Template:
    try:
        return Template.parse(value)
    except TemplateError as error:
        raise refused(str(error)) from None


def _url(value: str) -> str:
    _template(value)
    if not value.isprintable() or " " in value:
        raise refused("expected an address without blanks and control characters")
    try:
        address = urlsplit(value)
        _ = address.port
    except ValueError as error:
        raise refused(f"expected an address such as https://host/path: {str(error).lower()}") from None
    if fault := _address_fault(address, value):
        raise refused(fault)
    return value


def _address_fault(address: SplitResult, value: str) -> str | None:
    if address.username is not None or address.password is not None:
        return "expected an address without a user name or password"
    if "#" in value:
        return "expected an address without a fragment"
    if "{" in address.netloc:
        return "expected placeholders in the path and query only"
    if address.scheme not in {"https", "http"} or not address.hostname:
        return "expected an address such as https://host/path"
    if address.scheme == "http" and not _is_loopback(address.hostname):
        return "expected https; plain http is for loopback addresses only"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _field_name(value: str) -> str:
    if not value or not value.isprintable():
        raise expected("the name of a form field")
    return value


def _digest_field(value: str) -> str:
    return _field_name(value) if value else value


def _field_text(value: str) -> str:
    _template(value)
    return value


def _device_name(value: str) -> str:
    if not value or not value.isprintable():
        raise expected("the name of a device")
    return value


def _device_template(value: str) -> str:
    if not _template(value).names:
        raise expected('a placeholder such as "{device}"')
    return value


def _header_name(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise refused("expected a header name of letters, digits and dashes")
    if value.lower() in _OUR_HEADERS:
        raise refused(f"{value} is set by backupd itself")
    return value


def _header_text(value: str) -> str:
    if not _HEADER_TEXT.fullmatch(value):
        raise refused("expected printable ASCII without blanks at the ends")
    _template(value)
    return value


def _digest_source(value: str) -> str:
    kind, _, place = value.partition(":")
    known = (
        value == "none"
        or (kind == "body" and _POINTER.fullmatch(place))
        or (kind == "header" and _TOKEN.fullmatch(place))
    )
    if not known:
        what = " or ".join((*map(quoted, ("body:/json/pointer", "header:Name")), quoted("none")))
        raise expected(what)
    return value


def _value_source(value: str) -> str:
    return value if not value else _digest_source(value)


def _proxy_url(value: str) -> str:
    if not value:
        return value
    try:
        address = urlsplit(value)
        named = address.scheme == "http" and address.hostname and address.port is not None
    except ValueError:
        named = False
    if not named or address.username is not None or address.path.strip("/") or address.query:
        raise refused("expected a proxy such as http://proxy.example.net:3128, its user in proxy_user")
    return value


def _ip_address(value: str) -> str:
    if value:
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise expected("an IP address") from None
    return value


def _host_name(value: str) -> str:
    if value and not _HOST.fullmatch(value):
        raise expected("a host name")
    return value


def _connect_to(value: str) -> str:
    host, colon, port = value.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if value and not (colon and port.isdigit() and 0 < int(port) < 65536 and _HOST_OR_IP.fullmatch(bare)):
        raise expected('a host and port such as "10.0.0.5:8443"')
    return value


def _pin(value: str) -> str:
    try:
        raw = base64.b64decode(value.removeprefix("sha256//"), validate=True)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise expected("a SHA-256 in base64")
    return value


def _token_url(value: str) -> str:
    return _url(value) if value else value


_ABSOLUTE_SCHEMA: Final = WithJsonSchema({"type": "string", "pattern": "^/"})
_FILE_SCHEMA: Final = WithJsonSchema({"type": "string", "minLength": 1})

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
AbsolutePath = Annotated[Path, BeforeValidator(_absolute_path), _ABSOLUTE_SCHEMA]
TlsPath = Annotated[Path, BeforeValidator(_tls_path), _FILE_SCHEMA]
DropSubfolder = Annotated[str, AfterValidator(_subfolder)]
FilePattern = Annotated[str, AfterValidator(_file_pattern)]
LabelPattern = Annotated[str, AfterValidator(_label_pattern)]
UrlTemplate = Annotated[str, AfterValidator(_url)]
FieldName = Annotated[str, AfterValidator(_field_name)]
DigestField = Annotated[str, AfterValidator(_digest_field)]
FieldText = Annotated[str, AfterValidator(_field_text)]
DeviceName = Annotated[str, AfterValidator(_device_name)]
DeviceTemplate = Annotated[str, AfterValidator(_device_template)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
HeaderText = Annotated[str, AfterValidator(_header_text)]
DigestSource = Annotated[str, AfterValidator(_digest_source)]
ValueSource = Annotated[str, AfterValidator(_value_source)]
ProxyUrl = Annotated[str, AfterValidator(_proxy_url)]
IpAddress = Annotated[str, AfterValidator(_ip_address)]
HostName = Annotated[str, AfterValidator(_host_name)]
ConnectTo = Annotated[str, AfterValidator(_connect_to)]
Pin = Annotated[str, AfterValidator(_pin)]
TokenUrl = Annotated[str, AfterValidator(_token_url)]
