"""What HTTP statuses mean to the policy, and the policy as a table for people."""

from __future__ import annotations

from backupd.core.policy import RULES, Reason

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


def as_markdown() -> str:
    """Return the policy as the table in `docs/destinations.md`."""
    lines = [
        "| what happens | reason | meaning | charged to | what happens next | what to do |",
        "|---|---|---|---|---|---|",
    ]
    for rule in RULES:
        statuses = [str(status) for status, reason in _BY_STATUS.items() if reason is rule.reason]
        seen = ", ".join([*statuses, *_ALSO_SEEN_AS.get(rule.reason, ())]) or "no answer"
        meaning = rule.meaning.partition(": ")[2] if rule.meaning[0].isdigit() else rule.meaning
        cells = (seen, f"`{rule.reason}`", meaning, rule.charge, rule.then, rule.hint)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(as_markdown())
