"""The types of single values in a configuration: how each is parsed, checked, written and described."""

import base64
import ipaddress
import os
import posixpath
import re
import warnings
from collections.abc import Iterable, Mapping
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, StringConstraints, WithJsonSchema

from backupd.config.problems import expected, refused
from backupd.core.bandwidth import RateSchedule, RateWindow
from backupd.core.names import TemplateError, TextTemplate
from backupd.core.retention_policy import MinFree

_NUMBER: Final = r"[0-9]{1,20}(?:\.[0-9]{1,9})?"

# Durations

_MICROSECONDS: Final = {
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1_000,
}
DURATION_PATTERN: Final = "^(?=.)" + "".join(f"(?:{_NUMBER}{unit})?" for unit in _MICROSECONDS) + "$"
_DURATION: Final = re.compile(DURATION_PATTERN)
_DURATION_PART: Final = re.compile(f"({_NUMBER})(ms|[dhms])")
MAX_DURATION: Final = timedelta(days=36500)
_DURATION_EXAMPLE: Final = 'a duration such as "2s"'


def parse_duration(text: str) -> timedelta:
    """Return a duration from its text, such as `1h30m`; the units are d, h, m, s and ms, in this order.

    Raise ValueError for another text, and for more than a hundred years.
    """
    if not _DURATION.fullmatch(text):
        raise ValueError(f"expected {_DURATION_EXAMPLE}")
    microseconds = sum(
        (Decimal(number) * _MICROSECONDS[unit] for number, unit in _DURATION_PART.findall(text)), Decimal(0)
    )
    if microseconds > MAX_DURATION // timedelta(microseconds=1):
        raise ValueError(f'expected a duration of at most "{MAX_DURATION.days}d"')
    return timedelta(microseconds=int(microseconds))


def format_duration(duration: timedelta) -> str:
    """Return the text of a duration in the largest unit of which it is a whole number, else in seconds.

    `parse_duration` reads it back; `core.units.human_duration` is the form for people.
    """
    microseconds = duration // timedelta(microseconds=1)
    if not microseconds:
        return "0s"
    for unit in ("d", "h", "m", "s"):
        if microseconds % _MICROSECONDS[unit] == 0:
            return f"{microseconds // _MICROSECONDS[unit]}{unit}"
    seconds = Decimal(microseconds) / _MICROSECONDS["s"]
    return f"{seconds:f}s"


def _to_duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        if not timedelta(0) <= value <= MAX_DURATION:
            raise expected(_DURATION_EXAMPLE)
        return value
    if not isinstance(value, str):
        raise expected(_DURATION_EXAMPLE)
    try:
        return parse_duration(value)
    except ValueError as error:
        raise expected(str(error).removeprefix("expected ")) from None


def _to_positive_duration(value: timedelta) -> timedelta:
    if not value:
        raise expected('a duration longer than "0s"')
    return value


Duration = Annotated[
    timedelta,
    BeforeValidator(_to_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}),
]
"""A duration from 0 to 36,500 days."""

PositiveDuration = Annotated[
    Duration,
    AfterValidator(_to_positive_duration),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN.replace("(?=.)", "(?=.*[1-9])")}),
]
"""A duration above 0."""

# Sizes

_BYTES: Final = {"B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("kMGTP", start=1)
}
_BYTES_BY_UNIT: Final = {unit.lower(): factor for unit, factor in _BYTES.items()}
SIZE_PATTERN: Final = f"^{_NUMBER} ?(?:[kKmMgGtTpP][iI]?)?[bB]$"
_SIZE: Final = re.compile(f"({_NUMBER}) ?((?:[kmgtp]i?)?b)", re.IGNORECASE)
MAX_SIZE: Final = 2**63 - 1
_SIZE_EXAMPLE: Final = 'a size such as "20MB"'


def parse_size(text: str) -> int:
    """Return a number of bytes from its text, such as `20MB`; 1 kB is 1000 bytes, 1 KiB is 1024.

    Raise ValueError for another text, for a fraction of a byte, and for more than 2**63 - 1 bytes.
    """
    if not (match := _SIZE.fullmatch(text)):
        raise ValueError(f"expected {_SIZE_EXAMPLE}")
    number, unit = match.groups()
    size = Decimal(number) * _BYTES_BY_UNIT[unit.lower()]
    if size > MAX_SIZE:
        raise ValueError('expected a size of less than "8192PiB"')
    if size != int(size):
        raise ValueError("expected a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """Return the text of a number of bytes in the unit of which it is the smallest whole number."""
    amounts = [(size // factor, unit) for unit, factor in _BYTES.items() if size and size % factor == 0]
    amount, unit = min(amounts, key=lambda each: each[0], default=(0, "B"))
    return f"{amount}{'KiB' if unit == 'kiB' else unit}"


def _to_size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE:
        return value
    if not isinstance(value, str):
        raise expected(_SIZE_EXAMPLE)
    try:
        return parse_size(value)
    except ValueError as error:
        raise expected(str(error).removeprefix("expected ")) from None


Size = Annotated[
    int,
    BeforeValidator(_to_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    WithJsonSchema({"type": ["string", "integer"], "minimum": 0, "pattern": SIZE_PATTERN}),
]
"""A number of bytes, written with a unit or as a bare number."""

# Percentages

PERCENT_PATTERN: Final = f"^{_NUMBER}%$"
_PERCENT: Final = re.compile(f"({_NUMBER})%")
_PERCENTAGE_RANGE: Final = 'a percentage from "1%" to "1000%"'


def _to_fraction(value: object) -> float:
    if isinstance(value, float) and 0.01 <= value <= 10:
        return value
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    fraction = Decimal(match[1]) / 100 if match else Decimal(0)
    if not Decimal("0.01") <= fraction <= 10:
        raise expected(_PERCENTAGE_RANGE)
    return float(fraction)


def _format_percentage(fraction: float) -> str:
    return f"{fraction * 100:.10g}%"


Percentage = Annotated[
    float,
    BeforeValidator(_to_fraction),
    PlainSerializer(_format_percentage, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": PERCENT_PATTERN}),
]
"""A fraction from 0.01 to 10, written in percent."""

# Rates

_TIME_WINDOW: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
_RATE_EXAMPLE: Final = 'a rate such as "2MB/s", or "none"'
_RATE_PATTERN: Final = f"{SIZE_PATTERN[:-1]}(?:/s)?$|^none$"
_MIN_RATE: Final = 1024


def _parse_rate(value: object) -> int | None:
    if value == "none":
        return None
    if not isinstance(value, str):
        raise expected(_RATE_EXAMPLE)
    try:
        rate = parse_size(value.removesuffix("/s"))
    except ValueError:
        raise expected(_RATE_EXAMPLE) from None
    if rate < _MIN_RATE:
        raise expected('a rate of at least "1KiB/s"')
    return rate


def _to_schedule(value: object) -> RateSchedule:
    if isinstance(value, RateSchedule):
        return value
    if not isinstance(value, Mapping):
        return RateSchedule((), _parse_rate(value))
    windows = []
    for key, rate in value.items():
        if key == "default":
            continue
        match = _TIME_WINDOW.fullmatch(str(key))
        if not match or match[1] + match[2] == match[3] + match[4]:
            raise refused('expected hours such as "08:00-18:00", or "default", as keys')
        begin, end = (int(match[i]) * 60 + int(match[i + 1]) for i in (1, 3))
        windows.append(RateWindow(begin, end, _parse_rate(rate)))
    return RateSchedule(tuple(windows), _parse_rate(value.get("default", "none")))


def _format_schedule(schedule: RateSchedule) -> str | dict[str, str]:
    if not schedule.windows:
        return _format_rate(schedule.default)
    hours = {f"{_format_time(w.start)}-{_format_time(w.end)}": _format_rate(w.rate) for w in schedule.windows}
    return {**hours, "default": _format_rate(schedule.default)}


def _format_rate(rate: int | None) -> str:
    return "none" if rate is None else f"{format_size(rate)}/s"


def _format_time(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


Bandwidth = Annotated[
    RateSchedule,
    BeforeValidator(_to_schedule),
    PlainSerializer(_format_schedule, when_used="json"),
    WithJsonSchema(
        {
            "type": ["string", "object"],
            "pattern": _RATE_PATTERN,
            "additionalProperties": {"type": "string", "pattern": _RATE_PATTERN},
        }
    ),
]
"""A rate in bytes per second, or a table of rates by the time of day."""

# Free space

_MIN_FREE_PERCENT: Final = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,3})?)%")
_MIN_FREE_EXAMPLE: Final = 'a size such as "2GiB", or a percentage such as "5%"'


def _to_min_free(value: object) -> MinFree:
    if isinstance(value, MinFree):
        return value
    if not isinstance(value, str):
        raise expected(_MIN_FREE_EXAMPLE)
    if match := _MIN_FREE_PERCENT.fullmatch(value):
        min_free = MinFree(percent=float(match[1]))
    else:
        try:
            min_free = MinFree(parse_size(value))
        except ValueError:
            raise expected(_MIN_FREE_EXAMPLE) from None
    if min_free == MinFree():
        raise expected("more than 0")
    return min_free


def _format_min_free(min_free: MinFree) -> str:
    return f"{min_free.percent:g}%" if min_free.percent else format_size(min_free.size)


FreeSpace = Annotated[
    MinFree,
    BeforeValidator(_to_min_free),
    PlainSerializer(_format_min_free, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": f"{SIZE_PATTERN}|^{_MIN_FREE_PERCENT.pattern}$"}),
]
"""A number of bytes, or a percentage of the filesystem below 100."""

# Names, paths, URLs and header fields

NAME_PATTERN: Final = "^[A-Za-z0-9][A-Za-z0-9._-]*$"

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_HEADER_TEXT: Final = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?")
_RESERVED_HEADERS: Final = frozenset(
    {"content-length", "content-type", "host", "idempotency-key", "transfer-encoding"}
)
_CREDENTIAL_NAME: Final = re.compile(
    r"auth|cookie|credential|jwt|key|passw|secret|signature|token|(?:^|[-_])(?:code|pass|pwd|sid|sig)$",
    re.IGNORECASE,
)
_HARMLESS_NAME: Final = re.compile(
    r"(?:x-)?(?:"
    r"accept|accept-.*|cache-control|content-.*|depth|from|if-.*|origin|overwrite|prefer|referer|user-agent"
    r"|api-version|backup-.*|comp|count|date|days|device|dir|directory|drop|encoding|env|environment|file|file-?name"
    r"|folder|format|host|hostname|kind|lang|level|limit|max|method|min|mode|mtime|name|offset|op|operation"
    r"|page|part|path|port|priority|project|replicas|repo|repository|restype|retention|retries|site|size"
    r"|source|tag|tags|timeout|ttl|type|v|ver|version"
    r")",
    re.IGNORECASE,
)
_HARMLESS_TEXT: Final = re.compile(r"[\W_]*|(?:true|false|yes|no|on|off)|\d{4}-\d{2}-\d{2}", re.IGNORECASE)
_FLAG: Final = re.compile(r"(?=.{1,20}\Z)[a-z]+(?:[-_.][a-z]+)*")
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_HOST_OR_IP: Final = re.compile(r"[A-Za-z0-9:](?:[A-Za-z0-9.:-]{0,251}[A-Za-z0-9:])?")
_POINTER: Final = re.compile(r"(?:/(?:[^~/]|~[01])*)+")  # RFC 6901, section 3


def names_a_credential(name: str) -> bool:
    """Return whether a header, field or query parameter with this name is likely to contain a secret."""
    return _CREDENTIAL_NAME.search(name) is not None


def may_hold_a_secret(name: str, constants: Iterable[str]) -> bool:
    """Return whether a header or query parameter may hold a secret, given its text between placeholders.

    It does not if its name is a known one, or its text is punctuation, a date or a switch.
    """
    if names_a_credential(name):
        return True
    return not _HARMLESS_NAME.fullmatch(name) and not all(map(_HARMLESS_TEXT.fullmatch, constants))


def may_be_a_secret(parameter: str) -> bool:
    """Return whether a query parameter without a value may be a secret: it is not a word in lower case."""
    harmless = (_HARMLESS_NAME, _HARMLESS_TEXT, _FLAG)
    return not any(pattern.fullmatch(parameter) for pattern in harmless)


def _absolute(value: object, description: str) -> Path:
    if isinstance(value, Path):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise expected(description)
    return Path(posixpath.normpath(value))


def _absolute_path(value: object) -> Path:
    return _absolute(value, "an absolute path")


def _tls_path(value: object) -> Path:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder and isinstance(value, str) and _is_credential(folder, value):
        value = os.path.join(folder, value)
    return _absolute(value, "an absolute path, or the name of a file in $CREDENTIALS_DIRECTORY")


def _is_credential(folder: str, name: str) -> bool:
    """Return whether a bare file name is that of a credential in systemd's `folder` of them."""
    is_bare = name not in {"", ".", ".."} and not {"/", "\0"} & set(name)
    return is_bare and os.path.isfile(os.path.join(folder, name))


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
            warnings.simplefilter(
                "error"
            )  # a pattern that Python warns about has another meaning in a later version
            pattern = re.compile(value)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        raise refused(f"expected a regular expression: {error}") from None
    if not pattern.groupindex:
        raise expected('a named group such as "(?P<device>[^/]+)"')
    return value


def _template(value: str) -> TextTemplate:
    try:
        return TextTemplate.parse(value)
    except TemplateError as error:
        raise refused(str(error)) from None


def _url(value: str) -> str:
    _template(value)
    if not value.isprintable() or " " in value:
        raise refused("expected a URL without blanks and control characters")
    try:
        address = urlsplit(value)
        _ = address.port
    except ValueError as error:
        raise refused(f"expected a URL such as https://host/path: {str(error).lower()}") from None
    if fault := _address_fault(address, value):
        raise refused(fault)
    return value


def _address_fault(address: SplitResult, value: str) -> str | None:
    if address.username is not None or address.password is not None:
        return "expected a URL without a user name or password"
    if "#" in value:
        return "expected a URL without a fragment"
    if "{" in address.netloc:
        return "expected placeholders in the path and query only"
    if address.scheme not in {"https", "http"} or not address.hostname:
        return "expected a URL such as https://host/path"
    if address.scheme == "http" and not is_loopback(address.hostname):
        return "expected https; plain http is for loopback addresses only"
    return None


def is_loopback(host: str) -> bool:
    """Return whether a host name or an IP address is this host's loopback interface."""
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
    if value.lower() in _RESERVED_HEADERS:
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
        raise expected('"body:/json/pointer" or "header:Name" or "none"')
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


NO_PROXY: Final = "none"
"""The value of `auth.proxy` for a token endpoint that is reached without the destination's proxy."""


def _token_proxy_url(value: str) -> str:
    return value if value == NO_PROXY else _proxy_url(value)


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


def host_and_port(address: str) -> tuple[str, int]:
    """Return the host, without the brackets of an IPv6 address, and the port of a `ListenAddress`."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listen_address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    is_valid = bool(colon) and port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if is_valid and host != "localhost":
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            is_valid = (ipaddress.ip_address(bare).version == 6) is (bare != host)
        except ValueError:
            is_valid = False
    if not is_valid:
        raise expected('an IP address and a port such as "127.0.0.1:9184"')
    return value


def _textfile_path(value: Path) -> Path:
    if value.suffix != ".prom":
        raise expected('a file that ends with ".prom", as node_exporter reads no others')
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


def _ping_url(value: str) -> str:
    try:
        address = urlsplit(value)
        is_valid = address.scheme in {"https", "http"} and bool(address.hostname) and address.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or not value.isascii() or not value.isprintable() or " " in value:
        raise refused("expected a URL such as https://hc-ping.com/UUID")
    if address.username is not None or address.password is not None:
        raise refused("expected a URL without a user name or password")
    if address.scheme == "http" and not is_loopback(address.hostname or ""):
        raise refused("expected https; plain http is for loopback addresses only")
    return value


def _command_word(value: str) -> str:
    if "\0" in value:
        raise expected("a text without null characters")
    return value


_EVENT_NAME: Final = re.compile(r"[a-z]+\.[a-z_]+")


def _event_name(value: str) -> str:
    if not _EVENT_NAME.fullmatch(value):
        raise expected('the name of an event such as "archive.rejected"')
    return value


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
TokenProxyUrl = Annotated[str, AfterValidator(_token_proxy_url)]
IpAddress = Annotated[str, AfterValidator(_ip_address)]
HostName = Annotated[str, AfterValidator(_host_name)]
ConnectTo = Annotated[str, AfterValidator(_connect_to)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
TextfilePath = Annotated[AbsolutePath, AfterValidator(_textfile_path)]
Pin = Annotated[str, AfterValidator(_pin)]
TokenUrl = Annotated[str, AfterValidator(_token_url)]
PingUrl = Annotated[str, AfterValidator(_ping_url)]
CommandWord = Annotated[str, AfterValidator(_command_word)]
EventName = Annotated[str, AfterValidator(_event_name)]
