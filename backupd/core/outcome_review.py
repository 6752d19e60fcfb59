"""The review of an outcome by those of other archives, to find whether archive or destination is at fault."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

from backupd.core.model import Deferred, Delivered, Delivery, Outcome, Rejected, Superseded
from backupd.core.names import as_text
from backupd.core.policy import Action, Reason, rule_of

_MAX_EQUAL_REJECTIONS = 3
"""Archives that are rejected in a row with the same status and words, before it is the destination."""

_MAX_REJECTIONS = 10
"""The same whatever the words are."""

_MIN_FAILURES_ALONE = 5
"""Failures of one archive in a row before it is the archive."""

_MIN_SUCCESSES = 2
"""Successes of other archives since the first of these attempts began, each at the first attempt."""

_MIN_ALONE = 3
"""Archives at fault, from which on another one that fails is at fault as well if others have just passed."""

_RECENT = 10
"""The latest outcomes, of which one has to be a success for that."""

_CERTAINLY_ALONE = 30
"""The same numbers of failures and successes, if the destination now and then fails with others as well."""

_MAX_FAILING = 1000
"""Archives of which the failures are counted."""

_NOT_ABOUT_ONE = frozenset(
    {
        *(Reason.DNS, Reason.CONNECT, Reason.CONNECT_TIMEOUT, Reason.TLS, Reason.TLS_CLIENT, Reason.PROXY),
        *(Reason.SIGN_IN, Reason.UNAUTHORIZED, Reason.RATE_LIMITED, Reason.LOCAL_FILES, Reason.STOPPED),
        *(Reason.ALL_REFUSED, Reason.HOST_LIMIT),
    }
)
"""Failures that no archive can cause: the destination has not seen it, or it limits all of them."""


@dataclass(slots=True)
class _Failures:
    """The failures of one delivery in a row, and the successes of others before them.

    `recent` are those since a delivery last succeeded after a failure: the destination may have been at
    fault until then. `since` is the number of successes before them, or before another delivery began to
    fail.
    """

    since: int
    first_since: int
    recent: int = 0
    count: int = 0
    is_alone: bool = False

    def show_fault(self, successes: int) -> bool:
        """Return whether the archive is at fault, after so many successes."""
        if self.recent >= _MIN_FAILURES_ALONE and successes >= self.since + _MIN_SUCCESSES:
            return True
        return self.count >= _CERTAINLY_ALONE and successes >= self.first_since + _CERTAINLY_ALONE


@dataclass(slots=True)
class OutcomeReview:
    """The latest outcomes of one destination; not safe to use from several threads.

    `was_refusing` is whether the destination refused every archive before the start, so that one more refusal
    is its fault as well. The counts begin at zero with each start.
    """

    was_refusing: bool = False
    _rejected: dict[tuple[int | None, str], set[int]] = field(default_factory=dict)
    """The archives that were rejected since the last success, by status and words."""
    _failing: dict[str, _Failures] = field(default_factory=dict)
    """The failures of each delivery."""
    _begun: dict[str, int] = field(default_factory=dict)
    """The number of successes before each attempt that is under way."""
    _successes: int = 0
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Whether the latest outcomes were successes."""

    def begin(self, delivery: Delivery) -> None:
        """Note that an attempt begins; `review` gets its outcome."""
        self._begun[delivery.id] = self._successes

    def review(self, delivery: Delivery, outcome: Outcome) -> Outcome:
        """Return an outcome, as a failure of the other party if those of other archives show this."""
        before = self._begun.pop(delivery.id, self._successes)
        self._recent.append(isinstance(outcome, Delivered))
        match outcome:
            case Delivered():
                self._successes += 1
                self._rejected.clear()
                self.was_refusing = False
                if self._failing.pop(delivery.id, None):  # what fails now and then is the destination
                    for each in self._failing.values():
                        each.recent, each.since = 0, self._successes
            case Rejected():
                outcome = self._of_rejection(delivery, outcome)
            case Deferred() if rule_of(outcome.reason).action is Action.PAUSE:
                return self._of_failure(delivery, outcome, before)
            case Deferred() | Superseded():
                return outcome
        self._failing.pop(delivery.id, None)
        return outcome

    def _of_rejection(self, delivery: Delivery, rejected: Rejected) -> Outcome:
        if rejected.http_status is None:  # by this host
            return rejected
        words = _words(rejected.error, as_text(delivery.archive.relpath))
        equal = self._rejected.get((rejected.http_status, words), set())
        all_of_status = self._rejected.get((rejected.http_status, ""), set())
        if self.was_refusing or len(equal) >= _MAX_EQUAL_REJECTIONS or len(all_of_status) >= _MAX_REJECTIONS:
            return Deferred(Reason.ALL_REFUSED, rejected.error, rejected.http_status)
        for key in (words, ""):
            self._rejected.setdefault((rejected.http_status, key), set()).add(delivery.archive.id)
        return rejected

    def _of_failure(self, delivery: Delivery, failed: Deferred, before: int) -> Outcome:
        if failed.reason in _NOT_ABOUT_ONE:
            return failed
        if delivery.id not in self._failing:  # and others may have failed for the same cause
            for each in self._failing.values():
                each.since = self._successes
            if len(self._failing) >= _MAX_FAILING:
                del self._failing[next(iter(self._failing))]
        failures = self._failing.setdefault(delivery.id, _Failures(before, before))
        failures.recent += failed.retry_after is None  # else the destination says that it is at fault
        failures.count += 1
        is_one_of_many = (
            failed.retry_after is None
            and any(self._recent)
            and sum(each.is_alone for each in self._failing.values()) >= _MIN_ALONE
        )
        if not is_one_of_many and not failures.show_fault(self._successes):
            return failed
        failures.is_alone = True
        return Deferred(
            Reason.FAILS_ALONE,
            f"{rule_of(failed.reason).meaning}: {failed.error}",
            failed.http_status,
            failed.retry_after,
            unconfirmed_digest=failed.unconfirmed_digest,
        )


def _words(error: str, path: str) -> str:
    """Return the words of a response without the archive's name, and without numbers and identifiers."""
    for name in (path, path.rpartition("/")[2]):
        error = error.replace(name, " ")
    terms = (term for term in re.findall(r"[^\s\"'<>(){}\[\],;]+", error) if not re.search(r"\d", term))
    return " ".join(word.lower() for word in re.findall(r"[^\W_]+", " ".join(terms)) if len(word) < 20)
