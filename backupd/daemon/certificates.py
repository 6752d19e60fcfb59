"""The TLS certificates of all destinations: loads renewed files and warns before one expires."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime

from backupd.config.files import ExamineFiles, FilesReport
from backupd.core.certificate_life import CertificateLife, CertificateState, Validity
from backupd.core.errors import BackupdError, ConfigError
from backupd.core.model import Deferred
from backupd.core.policy import Reason
from backupd.daemon.runtime import Runtime
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_RENEW_HINTS = {
    "client": "renew the files that `cert` and `key`, or those of `auth`, name; no restart is needed",
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
        self._validities = dict(report.validities)
        self._changing: set[str] = set()
        """Names of the destinations with files that changed since the last tick."""
        self._logged: dict[tuple[str, str], tuple[CertificateState, int]] = {}
        """State and days left in the last warning, by destination and role of the certificate."""
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
        self._report, self._validities = report, dict(report.validities)

    def pause_unusable(self, started: Iterable[str]) -> None:
        """Pause those of the started destinations of which the files cannot be used.

        Each heartbeat tries the files again. A destination that has run before goes on with its earlier ones.
        """
        for name in started:
            if problems := self._report.unusable(name):
                error = "; ".join(problem.message for problem in problems)
                self._runtime.destinations[name].circuit.record_outcome(Deferred(Reason.LOCAL_FILES, error))
                self._refused.add(name)

    def client_lives(self) -> Mapping[str, CertificateLife]:
        """Return how long the client certificate of each destination is still valid."""
        now = datetime.now(UTC)
        return {
            name: self._report.certificate_limits.life(validity, now)
            for name, validity in self._validities.items()
            if name in self._runtime.destinations
        }

    def log_expiring(self) -> None:
        """Log each certificate that is about to expire or has expired: if its state changes, and once a day.

        Refused files are retried first: the fault may be fixed without a change of these files.
        """
        if refused := self._refused & set(self._runtime.destinations):
            self._apply_renewal(refused)
        now = datetime.now(UTC)
        for name, role, validity in self._all():
            life = self._report.certificate_limits.life(validity, now)
            step = (life.state, life.days_left)
            if life.state is CertificateState.VALID:
                self._logged.pop((name, role), None)
            elif self._logged.get((name, role)) != step:
                self._logged[name, role] = step
                self._log.emit(
                    events.CERTIFICATE_EXPIRING,
                    destination=name,
                    certificate_role=role,
                    certificate_state=life.state,
                    days_left=life.days_left,
                    expires_at=validity.ends,
                    hint=_RENEW_HINTS[role],
                )

    def _all(self) -> Iterator[tuple[str, str, Validity]]:
        """Yield destination, role and validity of each certificate."""
        for name, running in self._runtime.destinations.items():
            if name in self._validities:
                yield name, "client", self._validities[name]
            if running.endpoint.server_certificate is not None:
                yield name, "server", running.endpoint.server_certificate

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
            if report and name in report.validities:
                self._validities[name] = report.validities[name]
            life = self.client_lives().get(name)
            self._log.emit(
                events.CERTIFICATE_RENEWED, destination=name, days_left=life.days_left if life else None
            )
