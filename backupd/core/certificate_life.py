"""How long a certificate is still valid, judged by days as well as by the share of its lifetime."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from backupd.core.units import human_duration


class CertificateState(StrEnum):
    """The state of a certificate; `critical` is below the second limit, and still valid."""

    VALID = "valid"
    EXPIRING = "expiring"
    CRITICAL = "critical"
    EXPIRED = "expired"


RENEW_HINTS = {
    "client": "renew the files that `cert` and `key`, or those of `auth`, name; no restart is needed",
    "server": "ask the operator of the destination to renew it",
}
"""What to do about an expiring certificate, by its role."""


@dataclass(frozen=True, slots=True)
class Validity:
    """The first and the last moment at which a certificate is valid."""

    begins: datetime
    ends: datetime


@dataclass(frozen=True, slots=True)
class CertificateLife:
    """How long a certificate is still valid, negative if it has expired, and the limits that hold for it."""

    left: timedelta
    limits: CertificateLimits

    @property
    def state(self) -> CertificateState:
        """Return the state by the limits."""
        if self.left <= timedelta(0):
            return CertificateState.EXPIRED
        if self.left < self.limits.critical:
            return CertificateState.CRITICAL
        return CertificateState.EXPIRING if self.left < self.limits.warning else CertificateState.VALID

    @property
    def days_left(self) -> int:
        """Return the whole days left, rounded down: 0 on the last day, negative afterwards."""
        return self.left.days

    def __str__(self) -> str:
        """Return the time left, such as `12 days` or `5 h`."""
        return (
            f"{self.days_left} days" if self.days_left >= 2 else human_duration(max(self.left, timedelta(0)))
        )


@dataclass(frozen=True, slots=True)
class CertificateLimits:
    """The time left from which on an expiring certificate is a warning, and critical."""

    warning: timedelta = timedelta(days=14)
    critical: timedelta = timedelta(days=3)

    def life(self, validity: Validity, now: datetime) -> CertificateLife:
        """Return how long a certificate is still valid at `now`.

        Certificates that live for days are renewed at two thirds of their lifetime. So the limits are at most
        a quarter and a tenth of it: 6 hours and 2.4 hours for one that lives a day.
        """
        lifetime = validity.ends - validity.begins
        limits = CertificateLimits(min(self.warning, lifetime / 4), min(self.critical, lifetime / 10))
        return CertificateLife(validity.ends - now, limits)
