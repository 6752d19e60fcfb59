"""Sends messages by Apprise, in a process of its own that ends afterwards.

The library and its plugins take as much memory as the daemon, change Python's logging, and may hang in a
plugin. A process can be ended at a time limit, and its memory is free again. It reads the messages, with the
URLs, from its standard input, so that they are in no list of processes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from urllib.parse import unquote

from backupd.core.names import printable
from backupd.telemetry.command import run_command

SEND_TIMEOUT = 30.0
"""Seconds for all messages that are sent at once; each is sent in a thread of its own."""

_SERVICE_TIMEOUT = 20.0
"""Seconds for one message, before the process is killed with all others."""

_MAX_ERROR = 300

_MAX_RESULT = 8192
"""Bytes of the line with a result: the characters of an error take up to twelve each, as escapes of JSON."""

_NOT_FOR_CHILD = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message for one URL; `receiver` identifies the result, and `severity` is a word of Apprise."""

    receiver: str
    url: str
    subject: str
    body: str
    severity: str = "info"


def send(envelopes: Sequence[Envelope], is_cancelled: Callable[[], bool]) -> dict[str, str]:
    """Send messages at the same time; return the error of each receiver, empty if it has its message.

    An error has no part of a URL that may be secret. With `is_cancelled` those that have not been sent by
    then are missing.
    """
    errors = {each.receiver: f"no result within {SEND_TIMEOUT:g} s" for each in envelopes}
    environ = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_CHILD}
    stdin = json.dumps([asdict(each) for each in envelopes]).encode()
    arguments = (sys.executable, "-P", "-m", "backupd.telemetry.sender")
    try:
        result = run_command(
            arguments,
            stdin,
            environ,
            SEND_TIMEOUT,
            is_cancelled=is_cancelled,
            with_stderr=False,
            max_output=_MAX_RESULT * len(envelopes),
        )
    except OSError as error:
        return dict.fromkeys(errors, f"no process can be started: {error.strerror}")
    if result.exit_code is not None:
        errors = dict.fromkeys(errors, "the process that sends it ended without a result")
    if result.is_cancelled:
        errors = {}
    receivers = {each.receiver for each in envelopes}
    return errors | {receiver: text for receiver, text in _results(result.output) if receiver in receivers}


def _results(output: bytes) -> Iterator[tuple[str, str]]:
    """Yield each receiver with a result and its error; lines that are no results are left out."""
    for line in output.splitlines():
        with suppress(ValueError, TypeError):  # printed by Python at its start
            receiver, text = json.loads(line)
            yield str(receiver), str(text)


def scheme_of(url: str) -> str:
    """Return the part of a URL that is never secret: its service."""
    return url.partition("://")[0]


def redacted(text: str, url: str, shown_url: str) -> str:
    """Return a text without the parts of a URL that may be secret.

    `shown_url` is the form of the URL that Apprise shows. Its host is kept; path, query and user are not,
    because the path of a webhook often is its password.
    """
    rest = url.partition("://")[2]
    before, _, _ = rest.partition("/")
    user, at, host = before.rpartition("@")
    pieces = [user + at, rest[len(before) :]]
    if host and host not in shown_url:
        pieces.append(host)
    words = {word for piece in pieces for word in re.split(r"[/?&=:@,;+]", piece) if len(word) > 2}
    for word in sorted(words | {unquote(word) for word in words}, key=len, reverse=True):
        text = text.replace(word, "***")
    return text


# The process


def main() -> None:
    """Send the messages on standard input; print a line of JSON for each when its result is known."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a plugin may print something, which is no result
    logging.getLogger("apprise").setLevel(logging.DEBUG)  # why a connection failed is at this level
    envelopes = [Envelope(**each) for each in json.load(sys.stdin)]
    lock = threading.Lock()

    def deliver(envelope: Envelope) -> None:
        try:
            error = _deliver(envelope)
        except Exception as failure:  # noqa: BLE001 -- whatever a plugin raises is the result
            error = f"Apprise failed: {type(failure).__name__}"
        with lock:
            results.write(json.dumps([envelope.receiver, error]) + "\n")
            results.flush()

    threads = [threading.Thread(target=deliver, args=(each,), daemon=True) for each in envelopes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SEND_TIMEOUT)
    os.kill(os.getpid(), signal.SIGKILL)  # threads of a plugin may hang, and Python would wait for them


def _deliver(envelope: Envelope) -> str:
    """Return the error of a message, empty if it was sent."""
    from apprise import Apprise, AppriseAsset, NotifyFormat  # noqa: PLC0415 -- optional, and large

    asset = AppriseAsset(app_id="backupd", app_desc="backupd", app_url="", service_timeout=_SERVICE_TIMEOUT)
    apprise = Apprise(asset=asset)
    if not apprise.add(envelope.url):
        return f"Apprise does not accept the URL of the service {scheme_of(envelope.url)}"
    result = apprise.notify(
        title=envelope.subject,
        body=envelope.body,
        notify_type=envelope.severity,
        body_format=NotifyFormat.TEXT,
        log_level=logging.DEBUG,
    )
    if result:
        return ""
    shown = apprise.urls(privacy=True)[0]
    details = _details((entry.level, entry.message) for entry in result.logs())
    return redacted(details, envelope.url, shown)[:_MAX_ERROR]


def _details(entries: Iterable[tuple[str, str]]) -> str:
    """Return the warnings of a failed message, and the error of its connection, as one line."""
    lines: Mapping[str, None] = {
        message.strip().rstrip("."): None
        for level, message in entries
        if level in ("WARNING", "ERROR", "CRITICAL") or message.startswith("Socket Exception:")
    }
    return printable("; ".join(lines)) or "the service did not take it, or did not answer in time"


if __name__ == "__main__":
    main()
