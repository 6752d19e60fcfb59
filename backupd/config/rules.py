"""Rules that the values of a configuration must fulfil together; `files` checks the files that it names."""

import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import PurePath, PurePosixPath
from typing import Final

from backupd.config.models import (
    AuthConfig,
    Config,
    DestinationConfig,
    DropConfig,
    HttpDestinationConfig,
    MetricsConfig,
    ReceiptConfig,
    RetryConfig,
)
from backupd.config.problems import ConfigFault, Place, did_you_mean, quoted
from backupd.config.types import format_duration, format_size, host_and_port, is_loopback
from backupd.core.model import DIGEST_BYTES
from backupd.core.names import TextTemplate

PLACEHOLDERS: Final = frozenset({"name", "stem", "relpath", "drop", "host", "size", "mtime", "digest"})

_MIN_PREFIX: Final = 8


def within_tables(config: Config) -> Iterator[ConfigFault]:
    """Yield the contradictions within each table, with the full path of their key."""
    yield from _below(("metrics",), _metrics_faults(config.metrics))
    for name, drop in config.drop.items():
        yield from _below(("drop", name), _drop_faults(drop))
    for name, destination in config.destination.items():
        table = ("destination", name)
        if isinstance(destination, HttpDestinationConfig):
            yield from _below(table, _http_faults(destination))
        yield from _below(table, destination.faults())
        yield from _below((*table, "retry"), _retry_faults(destination.retry))


def _below(table: Place, faults: Iterator[ConfigFault]) -> Iterator[ConfigFault]:
    """Yield faults of one table with places from the root of the configuration on."""
    for fault in faults:
        rests_on = tuple((*table, *place) for place in fault.rests_on)
        yield ConfigFault((*table, *fault.place), fault.text, rests_on)


def _drop_faults(drop: DropConfig) -> Iterator[ConfigFault]:
    """Yield the contradictions within one drop."""
    if overlap(PurePosixPath(drop.sent_dir), PurePosixPath(drop.rejected_dir)):
        yield ConfigFault(
            ("rejected_dir",),
            f"expected a folder apart from sent_dir, got {quoted(drop.rejected_dir)}",
            (("sent_dir",),),
        )
    if drop.max_size is not None and drop.max_size < drop.min_size:
        yield ConfigFault(
            ("max_size",),
            f'expected at least min_size, "{format_size(drop.min_size)}", got "{format_size(drop.max_size)}"',
            (("min_size",),),
        )
    for key in ("keep_sent_for", "keep_sent_last"):
        if getattr(drop, key) is not None and drop.on_delivered != "move":
            yield ConfigFault(
                (key,), 'no archive is moved to sent_dir; expected on_delivered "move"', (("on_delivered",),)
            )
    if drop.destinations and len(set(drop.destinations)) < len(drop.destinations):
        yield ConfigFault(("destinations",), "expected every destination once")
    for name in sorted(_labels(drop) & PLACEHOLDERS):
        yield ConfigFault(
            ("label_pattern",), f"the group {quoted(name)} has the name of a built-in placeholder"
        )
    yield from _expect_faults(drop)


def _expect_faults(drop: DropConfig) -> Iterator[ConfigFault]:
    expect = drop.expect
    if expect.devices and not expect.by:
        yield ConfigFault(("expect", "devices"), 'expected "by" to be set too', (("expect", "by"),))
    for key in ("by", "devices"):
        if getattr(expect, key) and expect.every is None and (key == "devices" or drop.size_alarm is None):
            yield ConfigFault(
                ("expect", key), 'expected "every" to be set too', (("expect", "every"), ("size_alarm",))
            )
    known = (PLACEHOLDERS - {"digest"}) | _labels(drop)
    for placeholder in sorted(TextTemplate.parse(expect.by or "").names - known):
        text = f"unknown placeholder {{{placeholder}}}{did_you_mean(placeholder, known)}"
        yield ConfigFault(("expect", "by"), text, (("label_pattern",),))


def _receipt_faults(receipt: ReceiptConfig) -> Iterator[ConfigFault]:
    """Yield the contradictions within one `receipt` table."""
    size = DIGEST_BYTES[receipt.algorithm]
    longest = size * 2 if receipt.encoding == "hex" else -(-size // 3) * 4
    if receipt.prefix and not _MIN_PREFIX <= receipt.prefix <= longest:
        yield ConfigFault(
            ("prefix",),
            f"expected 0 or {_MIN_PREFIX} to {longest} characters, got {receipt.prefix}",
            (("algorithm",), ("encoding",)),
        )


def _retry_faults(retry: RetryConfig) -> Iterator[ConfigFault]:
    """Yield the contradictions within one `retry` table."""
    if retry.max < retry.initial:
        yield ConfigFault(
            ("max",),
            f'expected at least initial, "{format_duration(retry.initial)}", '
            f'got "{format_duration(retry.max)}"',
            (("initial",),),
        )


def _http_faults(destination: HttpDestinationConfig) -> Iterator[ConfigFault]:
    """Yield the contradictions within one destination of the kind "http"."""
    yield from _below(("receipt",), _receipt_faults(destination.receipt))
    yield from _below(("auth",), _auth_faults(destination.auth))
    for key, companion in (("cert", "key"), ("key", "cert"), ("key_password_file", "key")):
        if getattr(destination, key) and not getattr(destination, companion):
            yield ConfigFault((key,), f'expected "{companion}" to be set too', ((companion,),))
    if destination.digest_field == destination.file_field:
        yield ConfigFault(("digest_field",), "expected another field than file_field", (("file_field",),))
    yield from _body_faults(destination)
    yield from _query_faults(destination)
    yield from _connection_faults(destination)
    for field in ("file_field", "digest_field"):
        if getattr(destination, field) in destination.fields:
            name = getattr(destination, field)
            yield ConfigFault(("fields", name), f"this form field is {field} already", ((field,),))
    for one, other in combinations(destination.headers, 2):
        if one.lower() == other.lower():
            yield ConfigFault(("headers", other), f"the same header as {quoted(one)}")


def _body_faults(destination: HttpDestinationConfig) -> Iterator[ConfigFault]:
    if destination.body == "raw":
        if destination.fields:
            yield ConfigFault(("fields",), "a raw body has no form fields", (("body",),))
        if destination.digest_at == "before":
            yield ConfigFault(("digest_at",), 'expected "after" or "header" with a raw body', (("body",),))
    if destination.create_folders and (destination.method, destination.body) != ("PUT", "raw"):
        text = 'expected method "PUT" and body "raw": only WebDAV servers have folders'
        yield ConfigFault(("create_folders",), text, (("method",), ("body",)))
    if destination.digest_at == "after":
        for place, text in destination.templates():
            if "digest" in TextTemplate.parse(text).names and place != ("query_url",):
                yield ConfigFault(
                    place, '{digest} is known only with digest_at = "header"', (("digest_at",),)
                )
    for one in destination.header_files:
        if any(one.lower() == other.lower() for other in destination.headers):
            yield ConfigFault(("header_files", one), "the same header as in headers", (("headers",),))


def _query_faults(destination: HttpDestinationConfig) -> Iterator[ConfigFault]:
    if destination.query_url and destination.receipt.digest == "none":
        text = 'a response without a digest verifies nothing; expected receipt.digest other than "none"'
        yield ConfigFault(("query_url",), text, (("receipt", "digest"),))


def _connection_faults(destination: HttpDestinationConfig) -> Iterator[ConfigFault]:
    if destination.proxy and destination.connect_to:
        yield ConfigFault(("connect_to",), "can't be used with a proxy", (("proxy",),))
    for key in ("proxy_user", "proxy_password_file"):
        if getattr(destination, key) and not destination.proxy:
            yield ConfigFault((key,), 'expected "proxy" to be set too', (("proxy",),))


_AUTH_KEYS: Final = {
    "none": (frozenset[str](), frozenset[str]()),
    "basic": (frozenset({"user", "password_file"}), frozenset[str]()),
    "bearer": (frozenset({"token_file"}), frozenset[str]()),
    "oauth2": (
        frozenset({"token_url", "client_id", "client_secret_file"}),
        frozenset(
            {
                *("secret_in", "scope", "audience", "resource", "ca", "cert", "key", "key_password_file"),
                *("proxy", "proxy_user", "proxy_password_file"),
            }
        ),
    ),
}
"""The keys that each authentication scheme requires, and those that it also accepts."""


def _auth_faults(auth: AuthConfig) -> Iterator[ConfigFault]:
    """Yield the contradictions within one `auth` table."""
    needed, allowed = _AUTH_KEYS[auth.type]
    for key in sorted(needed):
        if not getattr(auth, key):
            yield ConfigFault((key,), f'required for type "{auth.type}", but missing', (("type",),))
    for key, field in type(auth).model_fields.items():
        if key in needed | allowed | {"type"} or getattr(auth, key) == field.default:
            continue
        yield ConfigFault((key,), f'not used for type "{auth.type}"', (("type",),))
    companions = [("cert", "key"), ("key", "cert"), ("key_password_file", "key")]
    for key, companion in (*companions, ("proxy_user", "proxy"), ("proxy_password_file", "proxy")):
        if getattr(auth, key) and not getattr(auth, companion):
            yield ConfigFault((key,), f'expected "{companion}" to be set too', ((companion,),))


def is_local(metrics: MetricsConfig) -> bool:
    """Return whether only this host can connect to the metrics' server, if there is one."""
    return metrics.listen is None or is_loopback(host_and_port(metrics.listen)[0])


def _metrics_faults(metrics: MetricsConfig) -> Iterator[ConfigFault]:
    """Yield the contradictions within the `metrics` table."""
    companions = (("cert", "key"), ("key", "cert"), ("key_password_file", "key"), ("ca", "cert"))
    for key, companion in (*companions, ("cert", "listen")):
        if getattr(metrics, key) and not getattr(metrics, companion):
            yield ConfigFault((key,), f'expected "{companion}" to be set too', ((companion,),))
    if not is_local(metrics) and not metrics.cert:
        text = 'expected "cert" and "key" to be set too; plain HTTP is for loopback addresses only'
        yield ConfigFault(("listen",), text, (("cert",), ("key",)))


def between_tables(config: Config) -> Iterator[ConfigFault]:
    """Yield the contradictions at the top level, and between drops and destinations."""
    if config.certificate_critical > config.certificate_warning:
        yield ConfigFault(
            ("certificate_critical",),
            f'expected at most certificate_warning, "{format_duration(config.certificate_warning)}", '
            f'got "{format_duration(config.certificate_critical)}"',
            (("certificate_warning",),),
        )
    yield from _hook_faults(config)
    for name, drop in config.drop.items():
        yield from _unknown_destinations(name, drop, config)
        yield from _unverified_deletions(name, drop, config)
    for (one, first), (other, second) in combinations(config.drop.items(), 2):
        if overlap(first.path, second.path):
            yield ConfigFault(
                ("drop", other, "path"),
                f"expected a folder apart from drop.{one}.path, {quoted(str(first.path))}, "
                f"got {quoted(str(second.path))}",
                (("drop", one, "path"),),
            )
    for name, destination in config.destination.items():
        yield from _unknown_placeholders(name, destination, config)


def _hook_faults(config: Config) -> Iterator[ConfigFault]:
    if config.on_event and not config.on_event[0].startswith("/"):
        text = f"expected the absolute path of a program, got {quoted(config.on_event[0])}"
        yield ConfigFault(("on_event", 0), text)
    if config.on_events and not config.on_event:
        yield ConfigFault(("on_events",), 'expected "on_event" to be set too', (("on_event",),))


def overlap(one: PurePath, other: PurePath) -> bool:
    """Return whether two paths are the same folder or one is within the other."""
    return one.is_relative_to(other) or other.is_relative_to(one)


def goes_to(drop: DropConfig, destination: str) -> bool:
    """Return whether archives of a drop are delivered to a destination."""
    return drop.destinations is None or destination in drop.destinations


def _unknown_destinations(name: str, drop: DropConfig, config: Config) -> Iterator[ConfigFault]:
    for wanted in drop.destinations or ():
        if wanted not in config.destination:
            nearest = did_you_mean(wanted, config.destination)
            yield ConfigFault(
                ("drop", name, "destinations"),
                f"no destination is named {quoted(wanted)}{nearest}",
                (("destination", wanted),),
            )


def _unverified_deletions(name: str, drop: DropConfig, config: Config) -> Iterator[ConfigFault]:
    if drop.on_delivered != "delete":
        return
    for target, destination in config.destination.items():
        if goes_to(drop, target) and not destination.has_digest_receipt:
            yield ConfigFault(
                ("drop", name, "on_delivered"),
                f'expected "move" or "keep", as destination.{target}.receipt.digest is "none", got "delete"',
                (("drop", name, "destinations"), ("destination", target, "receipt", "digest")),
            )


def _unknown_placeholders(
    name: str, destination: DestinationConfig, config: "Config"
) -> Iterator[ConfigFault]:
    labels = {drop: _labels(each) for drop, each in config.drop.items() if goes_to(each, name)}
    rests_on = tuple(("drop", drop, key) for drop in config.drop for key in ("destinations", "label_pattern"))
    for place, template in destination.templates():
        for placeholder in sorted(TextTemplate.parse(template).names - PLACEHOLDERS):
            if text := _placeholder_fault(placeholder, labels):
                yield ConfigFault(("destination", name, *place), text, rests_on)


def _placeholder_fault(placeholder: str, labels: Mapping[str, frozenset[str]]) -> str | None:
    """Return the fault of a placeholder without a value for the archives of a drop; None if all have one.

    `labels` are the groups of each drop's label pattern.
    """
    lacking = [drop for drop, known in labels.items() if placeholder not in known]
    if not lacking and labels:
        return None
    if len(lacking) < len(labels):
        return f"placeholder {{{placeholder}}} is no named group of drop.{lacking[0]}.label_pattern"
    every = PLACEHOLDERS.union(*labels.values())
    return f"unknown placeholder {{{placeholder}}}{did_you_mean(placeholder, every)}"


def _labels(drop: DropConfig) -> frozenset[str]:
    return frozenset(re.compile(drop.label_pattern or "").groupindex)
