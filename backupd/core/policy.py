"""The failure policy: for each reason, whether destination or archive is to blame, and the consequence.

This one table decides when a destination is paused and when an archive is rejected. A failure that could be
the fault of either one is blamed on the destination, so that no archive is rejected without certainty.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum


class Blame(StrEnum):
    """The party that caused a failure, and against which it counts.

    A failure of the destination never counts against an archive: the archive stays in the queue however
    often the destination fails.
    """

    ARCHIVE = "archive"
    DESTINATION = "destination"


class Reason(StrEnum):
    """Why a delivery was deferred or rejected; the `reason` key of log events."""

    # no complete response
    DNS = "dns_failed"
    CONNECT = "connect_failed"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS = "tls_failed"
    TLS_CLIENT = "client_certificate_refused"
    CONNECTION_LOST = "connection_lost"
    PROTOCOL = "protocol_error"
    PROXY = "proxy_failed"
    READ_TIMEOUT = "read_timeout"
    WRITE_TIMEOUT = "write_timeout"
    TOO_SLOW = "too_slow"
    DEADLINE = "deadline_exceeded"
    # a response
    EARLY_SUCCESS = "early_success"
    REDIRECT = "redirected"
    SIGN_IN = "sign_in_failed"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    NO_FOLDER = "no_folder"
    TOO_LARGE = "too_large"
    HEAD_TOO_LARGE = "head_too_large"
    REFUSED = "archive_refused"
    ALL_REFUSED = "all_refused"
    FAILS_ALONE = "fails_alone"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    UNEXPECTED_STATUS = "unexpected_status"
    UNVERIFIED = "unverified"
    MISMATCH = "digest_mismatch"
    # on this host
    LOCAL_FILES = "local_files_unusable"
    HOST_LIMIT = "host_limit"
    UNREADABLE = "archive_unreadable"
    MISSING = "archive_missing"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    STOPPED = "stopped"
    GAVE_UP = "gave_up"
    INTERNAL = "internal_error"


REJECTED_BY_INTAKE = frozenset((Reason.TRUNCATED, Reason.DAMAGED, Reason.CHECKSUM_MISMATCH))
"""Reasons of archives that are rejected before any upload, and do not count as one of their device."""


class Action(StrEnum):
    """The consequence of a failure.

    `PAUSE` pauses the destination with exponential backoff, and all its deliveries wait. `RETRY` repeats
    this delivery with exponential backoff, while the others go on. `REJECT` ends the deliveries of this
    archive and moves it to `rejected_dir`.
    """

    PAUSE = "pause"
    RETRY = "retry"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class FailureRule:
    """The policy for one reason.

    `meaning` and `hint` are for the operator: the failure in words, and the fix. With `retry_immediately`
    an attempt is repeated a few times at short intervals before `action` is taken.
    """

    reason: Reason
    blame: Blame
    action: Action
    meaning: str
    hint: str
    retry_immediately: bool = False


def rule_of(reason: Reason) -> FailureRule:
    """Return the policy for a reason."""
    return _RULE_BY_REASON[reason]


def reason_of_status(status: int) -> Reason:
    """Return the reason for an HTTP status other than success (RFC 9110, section 15; RFC 6585)."""
    if status in _REASON_BY_STATUS:
        return _REASON_BY_STATUS[status]
    if 300 <= status < 400:
        return Reason.REDIRECT
    if status >= 500:
        return Reason.SERVER_ERROR
    return Reason.UNEXPECTED_STATUS


def policy_table() -> str:
    """Return the policy as the table in `docs/destinations.md`."""
    lines = [
        "| cause | reason | meaning | counts against | consequence | fix |",
        "|---|---|---|---|---|---|",
    ]
    for rule in RULES:
        statuses = [str(status) for status, reason in _REASON_BY_STATUS.items() if reason is rule.reason]
        cause = ", ".join([*statuses, *_OTHER_CAUSES.get(rule.reason, ())]) or "no response"
        consequence = _ACTION_TEXT[rule.action]
        cells = (cause, f"`{rule.reason}`", rule.meaning, rule.blame, consequence, rule.hint)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_ACTION_TEXT = {
    Action.PAUSE: "pause the destination with exponential backoff, then retry",
    Action.RETRY: "retry this archive later",
    Action.REJECT: "reject this archive",
}

_D, _A = Blame.DESTINATION, Blame.ARCHIVE
_INSPECTION_HINT = (
    "check the backup on the device; to send this one, set `on_suspicious` to deliver, then `backupd retry`"
)

RULES: tuple[FailureRule, ...] = (
    FailureRule(
        Reason.DNS,
        _D,
        Action.PAUSE,
        "the host name could not be resolved",
        "check `url`, and the DNS resolver of this host",
    ),
    FailureRule(
        Reason.CONNECT,
        _D,
        Action.PAUSE,
        "the connection could not be established",
        "check that the destination is running, and that firewalls permit the connection",
        retry_immediately=True,
    ),
    FailureRule(
        Reason.CONNECT_TIMEOUT,
        _D,
        Action.PAUSE,
        "the destination did not answer the connection request in time",
        "check that the destination is up, and that no firewall drops the packets",
    ),
    FailureRule(
        Reason.TLS,
        _D,
        Action.PAUSE,
        "the TLS handshake failed",
        "run `backupd check`: it knows the fix for this error, and shows the destination's certificate",
    ),
    FailureRule(
        Reason.TLS_CLIENT,
        _D,
        Action.PAUSE,
        "the destination refused the client certificate",
        "check that the destination trusts the CA of `cert`, and that `cert` has not expired",
    ),
    FailureRule(
        Reason.CONNECTION_LOST,
        _D,
        Action.PAUSE,
        "the connection was lost before the response",
        "check the destination's log; it may not accept the client certificate",
        retry_immediately=True,
    ),
    FailureRule(
        Reason.PROTOCOL,
        _D,
        Action.PAUSE,
        "the response is not valid HTTP",
        "check the scheme, host and port in `url`",
    ),
    FailureRule(
        Reason.PROXY,
        _D,
        Action.PAUSE,
        "the proxy did not connect to the destination",
        "check `proxy`, `proxy_user` and `proxy_password_file`, and which destinations the proxy permits",
    ),
    FailureRule(
        Reason.READ_TIMEOUT,
        _D,
        Action.PAUSE,
        "the response did not arrive in time",
        "raise `timeout.read` if the destination takes long to check an archive",
    ),
    FailureRule(
        Reason.WRITE_TIMEOUT,
        _D,
        Action.PAUSE,
        "the destination stopped reading the request",
        "check the load of the destination; raise `timeout.write` for a very slow connection",
    ),
    FailureRule(
        Reason.TOO_SLOW,
        _D,
        Action.PAUSE,
        "the upload was slower than `min_rate` for a minute",
        "lower `min_rate` for a very slow connection",
    ),
    FailureRule(
        Reason.DEADLINE,
        _D,
        Action.PAUSE,
        "the attempt took longer than `deadline`",
        "raise `deadline` for large archives",
    ),
    FailureRule(
        Reason.EARLY_SUCCESS,
        _D,
        Action.PAUSE,
        "the destination reported success before the whole archive was sent",
        "check `url`: the server there does not read the request body",
    ),
    FailureRule(
        Reason.REDIRECT,
        _D,
        Action.PAUSE,
        "the destination redirects, and redirects are not followed",
        "set `url` to the final address",
    ),
    FailureRule(
        Reason.SIGN_IN,
        _D,
        Action.PAUSE,
        "the token endpoint issued no token",
        "check `auth`: `token_url`, `client_id`, `client_secret_file` and `scope`",
    ),
    FailureRule(
        Reason.UNAUTHORIZED,
        _D,
        Action.PAUSE,
        "the destination or the proxy does not accept the credentials",
        "check the credentials",
    ),
    FailureRule(
        Reason.FORBIDDEN,
        _D,
        Action.PAUSE,
        "the credentials are accepted, but have no permission",
        "check the permissions of the account, and that the destination trusts the client certificate",
    ),
    FailureRule(
        Reason.NOT_FOUND,
        _D,
        Action.PAUSE,
        "the destination accepts no uploads at this URL",
        "check `url`",
    ),
    FailureRule(
        Reason.CONFLICT,
        _A,
        Action.REJECT,
        "the destination has other content under this name or key",
        "compare the archive with the stored content, then `backupd retry`",
    ),
    FailureRule(
        Reason.NO_FOLDER,
        _D,
        Action.PAUSE,
        "the folder in `url` does not exist at the destination",
        "set `create_folders = true`, or create the folder there",
    ),
    FailureRule(
        Reason.TOO_LARGE,
        _A,
        Action.REJECT,
        "the archive is larger than the destination accepts",
        "raise the destination's limit, then `backupd retry`",
    ),
    FailureRule(
        Reason.HEAD_TOO_LARGE,
        _D,
        Action.PAUSE,
        "the destination accepts no request with header fields of this size",
        "check the size of the token and of `headers`, and raise the destination's limit",
    ),
    FailureRule(
        Reason.REFUSED,
        _A,
        Action.REJECT,
        "the destination refused the archive",
        "read the destination's response (`backupd show`), then `backupd retry`",
    ),
    FailureRule(
        Reason.ALL_REFUSED,
        _D,
        Action.PAUSE,
        "the destination refuses one archive after the other, always in the same words",
        "read its response (`backupd show`), fix what it names, then `backupd retry` those in `rejected_dir`",
    ),
    FailureRule(
        Reason.FAILS_ALONE,
        _A,
        Action.RETRY,
        "the destination fails with this archive, and stores others; retried for up to a day apart",
        "check the destination's log, and its limits for size and name of an archive, then `backupd retry`",
    ),
    FailureRule(
        Reason.RATE_LIMITED,
        _D,
        Action.PAUSE,
        "too many requests; Retry-After is honoured",
        "lower `workers` if it happens often",
    ),
    FailureRule(
        Reason.SERVER_ERROR,
        _D,
        Action.PAUSE,
        "the destination is temporarily unable to store archives; Retry-After is honoured",
        "check the destination's log",
    ),
    FailureRule(
        Reason.UNEXPECTED_STATUS,
        _D,
        Action.PAUSE,
        "the status is not one of `success`",
        "check `url`; if it is a 2xx with which the destination accepts archives, add it to `success`",
    ),
    FailureRule(
        Reason.UNVERIFIED,
        _D,
        Action.PAUSE,
        "the response reports success, but has no receipt",
        "check `receipt.digest` against the destination's response (`backupd show`)",
    ),
    FailureRule(
        Reason.MISMATCH,
        _D,
        Action.PAUSE,
        "the digest or size in the receipt is not that of the archive",
        "check the content that the destination stored",
    ),
    FailureRule(
        Reason.LOCAL_FILES,
        _D,
        Action.PAUSE,
        "a CA, certificate, key or secret file on this host can't be used",
        "run `backupd check`",
    ),
    FailureRule(
        Reason.HOST_LIMIT,
        _D,
        Action.PAUSE,
        "this host lacks descriptors or memory for a connection",
        "raise `LimitNOFILE=` or `MemoryMax=` of the unit; `open_files` in the heartbeat shows the use",
    ),
    FailureRule(
        Reason.UNREADABLE,
        _A,
        Action.RETRY,
        "the archive can't be read",
        "check the permissions of the file, and the disk",
    ),
    FailureRule(
        Reason.MISSING,
        _A,
        Action.RETRY,
        "the file is not in its place; retried once, after `rescan_every`",
        "move it back if it was renamed; if it is still missing then, `archive.missing` is logged",
    ),
    FailureRule(
        Reason.TRUNCATED,
        _A,
        Action.REJECT,
        "the archive ends too early",
        _INSPECTION_HINT,
    ),
    FailureRule(
        Reason.DAMAGED,
        _A,
        Action.REJECT,
        "the archive is damaged",
        _INSPECTION_HINT,
    ),
    FailureRule(
        Reason.CHECKSUM_MISMATCH,
        _A,
        Action.REJECT,
        "the archive does not match its checksum file",
        "replace the one that is wrong, then `backupd retry`",
    ),
    FailureRule(
        Reason.STOPPED,
        _D,
        Action.RETRY,
        "the daemon was stopped during the upload",
        "no action needed",
    ),
    FailureRule(
        Reason.GAVE_UP,
        _A,
        Action.REJECT,
        "the archive was not delivered within `retry.give_up_after`",
        "see its attempts (`backupd show`), then `backupd retry`",
    ),
    FailureRule(
        Reason.INTERNAL,
        _A,
        Action.RETRY,
        "a bug in backupd",
        "report it with the log line",
    ),
)

_RULE_BY_REASON = {rule.reason: rule for rule in RULES}

_REASON_BY_STATUS = {
    400: Reason.REFUSED,
    401: Reason.UNAUTHORIZED,
    403: Reason.FORBIDDEN,
    404: Reason.NOT_FOUND,
    405: Reason.NOT_FOUND,
    407: Reason.UNAUTHORIZED,
    408: Reason.SERVER_ERROR,
    409: Reason.CONFLICT,
    410: Reason.NOT_FOUND,
    413: Reason.TOO_LARGE,
    414: Reason.REFUSED,
    415: Reason.REFUSED,
    422: Reason.REFUSED,
    425: Reason.SERVER_ERROR,
    429: Reason.RATE_LIMITED,
    431: Reason.HEAD_TOO_LARGE,
}

_OTHER_CAUSES = {
    Reason.TLS_CLIENT: ("TLS alert", "nginx's 400 for a client certificate"),
    Reason.EARLY_SUCCESS: ("2xx",),
    Reason.NO_FOLDER: ("409 to a raw PUT",),
    Reason.HEAD_TOO_LARGE: ("400 with such a text",),
    Reason.ALL_REFUSED: ("three rejections in a row",),
    Reason.FAILS_ALONE: ("five failures, and others pass",),
    Reason.REDIRECT: ("3xx",),
    Reason.SIGN_IN: ("response of the token endpoint",),
    Reason.SERVER_ERROR: ("5xx",),
    Reason.UNEXPECTED_STATUS: ("any other status",),
    Reason.UNVERIFIED: ("2xx",),
    Reason.MISMATCH: ("2xx",),
    **dict.fromkeys(
        (
            *(Reason.LOCAL_FILES, Reason.HOST_LIMIT, Reason.UNREADABLE, Reason.MISSING, Reason.TRUNCATED),
            *(Reason.DAMAGED, Reason.CHECKSUM_MISMATCH, Reason.STOPPED, Reason.GAVE_UP, Reason.INTERNAL),
        ),
        ("on this host",),
    ),
}


if __name__ == "__main__":
    sys.stdout.write(policy_table())
