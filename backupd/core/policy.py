"""What each way to fail means, whom it is charged to, and what happens next."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Charge(StrEnum):
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


class Then(StrEnum):
    """What happens to the delivery."""

    PAUSE = "pause the destination, then try again"
    LATER = "try this archive again later"
    REJECT = "reject this archive"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the policy; `at_once` allows the few short attempts within a claim."""

    reason: Reason
    charge: Charge
    then: Then
    meaning: str
    hint: str
    at_once: bool = False


_D, _A = Charge.DESTINATION, Charge.ARCHIVE
_LOOK_AT_THE_DEVICE = "look at the device; to send it all the same, `inspect` off, then `backupd retry`"

RULES: tuple[Rule, ...] = (
    Rule(Reason.DNS, _D, Then.PAUSE, "the host name could not be resolved", "check the url and the resolver"),
    Rule(
        Reason.CONNECT,
        _D,
        Then.PAUSE,
        "no connection",
        "check that the endpoint runs and the firewall",
        at_once=True,
    ),
    Rule(
        Reason.CONNECT_TIMEOUT,
        _D,
        Then.PAUSE,
        "nobody answered the connection in time",
        "a firewall that drops packets looks like this",
    ),
    Rule(
        Reason.TLS,
        _D,
        Then.PAUSE,
        "the TLS handshake failed",
        "check `ca`, the host name in the endpoint's certificate, and its dates",
    ),
    Rule(
        Reason.TLS_CLIENT,
        _D,
        Then.PAUSE,
        "the endpoint refused our certificate",
        "check that the endpoint trusts the CA of `cert`, and that it has not expired",
    ),
    Rule(
        Reason.CONNECTION_LOST,
        _D,
        Then.PAUSE,
        "the connection broke before the answer",
        "look at the endpoint's log; one that hangs up at once may not accept our certificate",
        at_once=True,
    ),
    Rule(
        Reason.PROTOCOL,
        _D,
        Then.PAUSE,
        "the answer was no HTTP that we understand",
        "check the url and its port",
    ),
    Rule(
        Reason.PROXY,
        _D,
        Then.PAUSE,
        "the proxy would not connect us",
        "check `proxy`, its user and password, and what it allows",
    ),
    Rule(
        Reason.READ_TIMEOUT,
        _D,
        Then.PAUSE,
        "the answer did not come in time",
        "raise `timeout.read` if the endpoint takes long to check what it got",
    ),
    Rule(
        Reason.WRITE_TIMEOUT,
        _D,
        Then.PAUSE,
        "the endpoint stopped reading",
        "look at the endpoint's load; raise `timeout.write` for very slow lines",
    ),
    Rule(Reason.POOL_TIMEOUT, _D, Then.PAUSE, "no connection was free in time", "raise `timeout.pool`"),
    Rule(
        Reason.TOO_SLOW,
        _D,
        Then.PAUSE,
        "slower than `min_rate` for a minute",
        "lower `min_rate` for very slow lines",
    ),
    Rule(
        Reason.DEADLINE,
        _D,
        Then.PAUSE,
        "the whole attempt took longer than `deadline`",
        "raise `deadline` for large archives",
    ),
    Rule(
        Reason.EARLY_SUCCESS,
        _D,
        Then.PAUSE,
        "a success was answered before the whole archive was sent",
        "what answers there does not read the body; check the url",
    ),
    Rule(
        Reason.REDIRECT,
        _D,
        Then.PAUSE,
        "the endpoint redirects; redirects are not followed",
        "put the final address into `url`",
    ),
    Rule(
        Reason.SIGN_IN,
        _D,
        Then.PAUSE,
        "the token endpoint gave no token",
        "check `auth`: `token_url`, `client_id`, the secret's file and `scope`",
    ),
    Rule(
        Reason.UNAUTHORIZED,
        _D,
        Then.PAUSE,
        "401: the endpoint does not accept our sign-in",
        "check the credentials",
    ),
    Rule(
        Reason.FORBIDDEN,
        _D,
        Then.PAUSE,
        "403: signed in, but not allowed",
        "check our rights, and that the client certificate is trusted",
    ),
    Rule(
        Reason.NOT_FOUND, _D, Then.PAUSE, "404, 405 or 410: nothing takes uploads at this url", "check `url`"
    ),
    Rule(
        Reason.CONFLICT,
        _A,
        Then.REJECT,
        "409: the endpoint has other content under this name or key",
        "compare with what the endpoint stored, then `backupd retry`",
    ),
    Rule(
        Reason.TOO_LARGE,
        _A,
        Then.REJECT,
        "413: too large for the endpoint",
        "raise the endpoint's limit, then `backupd retry`",
    ),
    Rule(
        Reason.REFUSED,
        _A,
        Then.REJECT,
        "400, 414, 415, 422, 431: the endpoint will not have this archive",
        "read its answer with `backupd show`",
    ),
    Rule(
        Reason.RATE_LIMITED,
        _D,
        Then.PAUSE,
        "429: too many requests; Retry-After is kept",
        "lower `workers` if it happens often",
    ),
    Rule(
        Reason.SERVER_ERROR,
        _D,
        Then.PAUSE,
        "408, 425 or 5xx: the endpoint is in trouble; Retry-After is kept",
        "look at the endpoint's log",
    ),
    Rule(
        Reason.UNEXPECTED_STATUS,
        _D,
        Then.PAUSE,
        "a status that `success` does not list",
        "check `url`, or add the status to `success`",
    ),
    Rule(
        Reason.UNVERIFIED,
        _D,
        Then.PAUSE,
        "a success whose answer holds no receipt",
        "check `receipt.digest` against the endpoint's answer (`backupd show`)",
    ),
    Rule(
        Reason.MISMATCH,
        _D,
        Then.PAUSE,
        "the receipt's digest or size is not what was sent",
        "the endpoint stored something else; look at what it keeps",
    ),
    Rule(
        Reason.LOCAL_FILES,
        _D,
        Then.PAUSE,
        "our own CA, certificate, key or secret can't be used",
        "run `backupd check`",
    ),
    Rule(
        Reason.UNREADABLE,
        _A,
        Then.LATER,
        "the archive can't be read on this host",
        "check its permissions and the disk",
    ),
    Rule(
        Reason.TRUNCATED, _A, Then.REJECT, "the archive ends too early or holds nothing", _LOOK_AT_THE_DEVICE
    ),
    Rule(
        Reason.DAMAGED, _A, Then.REJECT, "damaged, or not what the archive's name says", _LOOK_AT_THE_DEVICE
    ),
    Rule(Reason.CHECKSUM_MISMATCH, _A, Then.REJECT, "not what its checksum file says", "see which is wrong"),
    Rule(Reason.STOPPED, _D, Then.LATER, "the daemon was stopped during the upload", "nothing to do"),
    Rule(
        Reason.GAVE_UP,
        _A,
        Then.REJECT,
        "not delivered within `retry.give_up_after`",
        "see its attempts with `backupd show`, then `backupd retry`",
    ),
    Rule(Reason.INTERNAL, _A, Then.LATER, "a bug in backupd", "report it with the log line"),
)

_BY_REASON = {rule.reason: rule for rule in RULES}


def rule_of(reason: Reason) -> Rule:
    """Return the row of the policy for a reason."""
    return _BY_REASON[reason]
