"""The TLS certificates of all destinations: loads renewed files and warns before one expires."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime

from backupd.config.files import ExamineFiles, FilesReport, days_left
from backupd.core.errors import BackupdError, ConfigError
from backupd.core.model import Deferred
from backupd.core.policy import Reason
from backupd.daemon.runtime import Runtime
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_WARNING_DAYS = (1, 3, 7, 14, 30)
"""Numbers of days before the expiry at which a warning is logged."""

_RENEW_HINTS = {
    "client": "renew the files that `cert` and `key` name; the daemon loads them without a restart",
    "server": "ask the operator of the destination to renew it",
}


class Certificates:
    """Tracks the certificates; `tick` is called every few seconds, `log_expiring` at each heartbeat."""

    def __init__(
        self, runtime: Runtime, log: EventLog, examine_files: ExamineFiles, report: FilesReport
    ) -> None:
        self._runtime = runtime
        self._log = log
        self._examine_files = examine_files
        self._report = report
        self._expires = dict(report.expires)
        self._changing: set[str] = set()
        """Names of the destinations with files that changed since the last tick."""
        self._logged_steps: dict[tuple[str, str], int] = {}
        """The number of days of the last warning, by destination and role of the certificate."""
        self._refused: set[str] = set()
        """Names of the destinations with new files that could not be loaded."""

    def tick(self) -> None:
        """Load renewed files once they no longer change: the key may be written after the certificate."""
        destinations = self._runtime.destinations
        changing = {name for name, running in destinations.items() if running.endpoint.files_changed()}
        renewed = (self._changing - changing) & set(destinations)
        self._changing = changing
        if renewed:
            self._apply_renewal(renewed)

    def update(self, report: FilesReport) -> None:
        """Replace the problems and expiry dates by those of a new report."""
        self._report, self._expires = report, dict(report.expires)

    def pause_unusable(self, started: Iterable[str]) -> None:
        """Pause those of the started destinations of which the files cannot be used.

        Each heartbeat tries the files again. A destination that has run before goes on with its earlier ones.
        """
        for name in started:
            if problems := self._report.unusable(name):
                error = "; ".join(problem.message for problem in problems)
                self._runtime.destinations[name].circuit.record_outcome(Deferred(Reason.LOCAL_FILES, error))
                self._refused.add(name)

    def days_left(self) -> Mapping[str, int]:
        """Return the whole days until the client certificate of each destination expires."""
        now = datetime.now(UTC)
        destinations = self._runtime.destinations
        return {name: days_left(end, now) for name, end in self._expires.items() if name in destinations}

    def log_expiring(self) -> None:
        """Log each certificate that has reached the next number of days in `_WARNING_DAYS`.

        Refused files are retried first: the fault may be fixed without a change of these files.
        """
        if refused := self._refused & set(self._runtime.destinations):
            self._apply_renewal(refused)
        now = datetime.now(UTC)
        for name, role, end in self._all():
            days = days_left(end, now)
            step = next((step for step in _WARNING_DAYS if days < step), None)
            if step is not None and self._logged_steps.get((name, role)) != step:
                self._log.emit(
                    events.CERTIFICATE_EXPIRING,
                    destination=name,
                    certificate_role=role,
                    days_left=days,
                    expires_at=end,
                    hint=_RENEW_HINTS[role],
                )
            if step is None:
                self._logged_steps.pop((name, role), None)
            else:
                self._logged_steps[name, role] = step

    def _all(self) -> Iterator[tuple[str, str, datetime]]:
        """Yield destination, role and expiry of each certificate."""
        for name, running in self._runtime.destinations.items():
            if name in self._expires:
                yield name, "client", self._expires[name]
            if running.endpoint.server_certificate_expires is not None:
                yield name, "server", datetime.fromtimestamp(running.endpoint.server_certificate_expires, UTC)

    def _apply_renewal(self, names: set[str]) -> None:
        """Load the files of some destinations; those that cannot be used leave the earlier ones in use."""
        try:
            report = self._examine_files()
        except ConfigError:
            report = None  # the configuration is being edited; the certificates may be valid nevertheless
        for name in sorted(names):
            running, unusable = self._runtime.destinations[name], report.unusable(name) if report else ()
            try:
                if unusable:
                    raise ConfigError("; ".join(p.message for p in unusable), unusable[0].hint)
                running.endpoint.reload_files()
            except BackupdError as error:
                self._log.emit(
                    events.CERTIFICATE_REFUSED, destination=name, error=error.message, hint=error.hint
                )
                self._refused.add(name)
                continue
            self._refused.discard(name)
            running.circuit.files_renewed()
            if report and name in report.expires:
                self._expires[name] = report.expires[name]
            self._log.emit(events.CERTIFICATE_RENEWED, destination=name, days_left=self.days_left().get(name))
