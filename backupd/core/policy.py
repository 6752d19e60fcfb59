"""What each way to fail means, whom it is charged to, and what happens next."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum


class Blame(StrEnum):
    """Whose fault a failure is."""

    ARCHIVE = "archive"
    DESTINATION = "destination"


class Reason(StrEnum):
    """Why a delivery was deferred or rejected; the `reason` key of events."""

    # the destination could not be reached, or went away
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
    POOL_TIMEOUT = "pool_timeout"
    TOO_SLOW = "too_slow"
    DEADLINE = "deadline_exceeded"
    # it answered
    EARLY_SUCCESS = "early_success"
    REDIRECT = "redirected"
    SIGN_IN = "sign_in_failed"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    REFUSED = "archive_refused"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    UNEXPECTED_STATUS = "unexpected_status"
    UNVERIFIED = "unverified"
    MISMATCH = "digest_mismatch"
    # on our side
    LOCAL_FILES = "local_files_unusable"
    UNREADABLE = "archive_unreadable"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    STOPPED = "stopped"
    GAVE_UP = "gave_up"
    INTERNAL = "internal_error"


class Action(StrEnum):
    """What happens to the delivery."""

    PAUSE = "pause the destination, then try again"
    LATER = "try this archive again later"
    REJECT = "reject this archive"


@dataclass(frozen=True, slots=True)
class FailureRule:
    """One row of the policy; `at_once` allows the few short attempts within a claim."""

    reason: Reason
    blame: Blame
    action: Action
    meaning: str
    hint: str
    retry_immediately: bool = False


_D, _A = Blame.DESTINATION, Blame.ARCHIVE
_LOOK_AT_THE_DEVICE = "look at the device; to send it all the same, `inspect` off, then `backupd retry`"

RULES: tuple[FailureRule, ...] = (
    FailureRule(
        Reason.DNS, _D, Action.PAUSE, "the host name could not be resolved", "check the url and the resolver"
    ),
    FailureRule(
        Reason.CONNECT,
        _D,
        Action.PAUSE,
        "no connection",
        "check that the endpoint runs and the firewall",
        retry_immediately=True,
    ),
    FailureRule(
        Reason.CONNECT_TIMEOUT,
        _D,
        Action.PAUSE,
        "nobody answered the connection in time",
        "a firewall that drops packets looks like this",
    ),
    FailureRule(
        Reason.TLS,
        _D,
        Action.PAUSE,
        "the TLS handshake failed",
        "check `ca`, the host name in the endpoint's certificate, and its dates",
    ),
    FailureRule(
        Reason.TLS_CLIENT,
        _D,
        Action.PAUSE,
        "the endpoint refused our certificate",
        "check that the endpoint trusts the CA of `cert`, and that it has not expired",
    ),
    FailureRule(
        Reason.CONNECTION_LOST,
        _D,
        Action.PAUSE,
        "the connection broke before the answer",
        "look at the endpoint's log; one that hangs up at once may not accept our certificate",
        retry_immediately=True,
    ),
    FailureRule(
        Reason.PROTOCOL,
        _D,
        Action.PAUSE,
        "the answer was no HTTP that we understand",
        "check the url and its port",
    ),
    FailureRule(
        Reason.PROXY,
        _D,
        Action.PAUSE,
        "the proxy would not connect us",
        "check `proxy`, its user and password, and what it allows",
    ),
    FailureRule(
        Reason.READ_TIMEOUT,
        _D,
        Action.PAUSE,
        "the answer did not come in time",
        "raise `timeout.read` if the endpoint takes long to check what it got",
    ),
    FailureRule(
        Reason.WRITE_TIMEOUT,
        _D,
        Action.PAUSE,
        "the endpoint stopped reading",
        "look at the endpoint's load; raise `timeout.write` for very slow lines",
    ),
    FailureRule(
        Reason.POOL_TIMEOUT, _D, Action.PAUSE, "no connection was free in time", "raise `timeout.pool`"
    ),
    FailureRule(
        Reason.TOO_SLOW,
        _D,
        Action.PAUSE,
        "slower than `min_rate` for a minute",
        "lower `min_rate` for very slow lines",
    ),
    FailureRule(
        Reason.DEADLINE,
        _D,
        Action.PAUSE,
        "the whole attempt took longer than `deadline`",
        "raise `deadline` for large archives",
    ),
    FailureRule(
        Reason.EARLY_SUCCESS,
        _D,
        Action.PAUSE,
        "a success was answered before the whole archive was sent",
        "what answers there does not read the body; check the url",
    ),
    FailureRule(
        Reason.REDIRECT,
        _D,
        Action.PAUSE,
        "the endpoint redirects; redirects are not followed",
        "put the final address into `url`",
    ),
    FailureRule(
        Reason.SIGN_IN,
        _D,
        Action.PAUSE,
        "the token endpoint gave no token",
        "check `auth`: `token_url`, `client_id`, the secret's file and `scope`",
    ),
    FailureRule(
        Reason.UNAUTHORIZED,
        _D,
        Action.PAUSE,
        "401: the endpoint does not accept our sign-in",
        "check the credentials",
    ),
    FailureRule(
        Reason.FORBIDDEN,
        _D,
        Action.PAUSE,
        "403: signed in, but not allowed",
        "check our rights, and that the client certificate is trusted",
    ),
    FailureRule(
        Reason.NOT_FOUND,
        _D,
        Action.PAUSE,
        "404, 405 or 410: nothing takes uploads at this url",
        "check `url`",
    ),
    FailureRule(
        Reason.CONFLICT,
        _A,
        Action.REJECT,
        "409: the endpoint has other content under this name or key",
        "compare with what the endpoint stored, then `backupd retry`",
    ),
    FailureRule(
        Reason.TOO_LARGE,
        _A,
        Action.REJECT,
        "413: too large for the endpoint",
        "raise the endpoint's limit, then `backupd retry`",
    ),
    FailureRule(
        Reason.REFUSED,
        _A,
        Action.REJECT,
        "400, 414, 415, 422, 431: the endpoint will not have this archive",
        "read its answer with `backupd show`",
    ),
    FailureRule(
        Reason.RATE_LIMITED,
        _D,
        Action.PAUSE,
        "429: too many requests; Retry-After is kept",
        "lower `workers` if it happens often",
    ),
    FailureRule(
        Reason.SERVER_ERROR,
        _D,
        Action.PAUSE,
        "408, 425 or 5xx: the endpoint is in trouble; Retry-After is kept",
        "look at the endpoint's log",
    ),
    FailureRule(
        Reason.UNEXPECTED_STATUS,
        _D,
        Action.PAUSE,
        "a status that `success` does not list",
        "check `url`, or add the status to `success`",
    ),
    FailureRule(
        Reason.UNVERIFIED,
        _D,
        Action.PAUSE,
        "a success whose answer holds no receipt",
        "check `receipt.digest` against the endpoint's answer (`backupd show`)",
    ),
    FailureRule(
        Reason.MISMATCH,
        _D,
        Action.PAUSE,
        "the receipt's digest or size is not what was sent",
        "the endpoint stored something else; look at what it keeps",
    ),
    FailureRule(
        Reason.LOCAL_FILES,
        _D,
        Action.PAUSE,
        "our own CA, certificate, key or secret can't be used",
        "run `backupd check`",
    ),
    FailureRule(
        Reason.UNREADABLE,
        _A,
        Action.LATER,
        "the archive can't be read on this host",
        "check its permissions and the disk",
    ),
    FailureRule(
        Reason.TRUNCATED,
        _A,
        Action.REJECT,
        "the archive ends too early or holds nothing",
        _LOOK_AT_THE_DEVICE,
    ),
    FailureRule(
        Reason.DAMAGED, _A, Action.REJECT, "damaged, or not what the archive's name says", _LOOK_AT_THE_DEVICE
    ),
    FailureRule(
        Reason.CHECKSUM_MISMATCH, _A, Action.REJECT, "not what its checksum file says", "see which is wrong"
    ),
    FailureRule(
        Reason.STOPPED, _D, Action.LATER, "the daemon was stopped during the upload", "nothing to do"
    ),
    FailureRule(
        Reason.GAVE_UP,
        _A,
        Action.REJECT,
        "not delivered within `retry.give_up_after`",
        "see its attempts with `backupd show`, then `backupd retry`",
    ),
    FailureRule(Reason.INTERNAL, _A, Action.LATER, "a bug in backupd", "report it with the log line"),
)

_BY_REASON = {rule.reason: rule for rule in RULES}


def rule_of(reason: Reason) -> FailureRule:
    """Return the row of the policy for a reason."""
    return _BY_REASON[reason]


_BY_STATUS = {
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
    431: Reason.REFUSED,
}


def reason_of_status(status: int) -> Reason:
    """Return why an HTTP status that is no success is a failure (RFC 9110 section 15, RFC 6585)."""
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if 300 <= status < 400:
        return Reason.REDIRECT
    if status >= 500:
        return Reason.SERVER_ERROR
    return Reason.UNEXPECTED_STATUS


_ALSO_SEEN_AS = {
    Reason.TLS_CLIENT: ("a TLS alert", "nginx's 400 about it"),
    Reason.EARLY_SUCCESS: ("2xx",),
    Reason.REDIRECT: ("3xx",),
    Reason.SIGN_IN: ("the token endpoint's answer",),
    Reason.SERVER_ERROR: ("5xx",),
    Reason.UNEXPECTED_STATUS: ("any other status",),
    Reason.UNVERIFIED: ("2xx",),
    Reason.MISMATCH: ("2xx",),
    **dict.fromkeys(
        (
            *(Reason.LOCAL_FILES, Reason.UNREADABLE, Reason.TRUNCATED, Reason.DAMAGED),
            *(Reason.CHECKSUM_MISMATCH, Reason.STOPPED, Reason.GAVE_UP, Reason.INTERNAL),
        ),
        ("on this host",),
    ),
}


def policy_table() -> str:
    """Return the policy as the table in `docs/destinations.md`."""
    lines = [
        "| what happens | reason | meaning | charged to | what happens next | what to do |",
        "|---|---|---|---|---|---|",
    ]
    for rule in RULES:
        statuses = [str(status) for status, reason in _BY_STATUS.items() if reason is rule.reason]
        seen = ", ".join([*statuses, *_ALSO_SEEN_AS.get(rule.reason, ())]) or "no answer"
        meaning = rule.meaning.partition(": ")[2] if rule.meaning[0].isdigit() else rule.meaning
        cells = (seen, f"`{rule.reason}`", meaning, rule.blame, rule.action, rule.hint)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(policy_table())
