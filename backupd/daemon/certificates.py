"""The TLS certificates of all destinations: loads renewed files and warns before one expires."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime

from backupd.config.files import ExamineFiles, FilesReport
from backupd.core.certificate_life import RENEW_HINTS, CertificateLife, CertificateState, Validity
from backupd.core.errors import BackupdError, ConfigError
from backupd.core.model import Deferred
from backupd.core.policy import Reason
from backupd.core.snapshot import CertificateSnapshot
from backupd.daemon.runtime import Runtime
from backupd.telemetry import events
from backupd.telemetry.log import EventLog


class Certificates:
    """Tracks the certificates; `tick` is called every few seconds, `log_expiring` at each heartbeat."""

    def __init__(
        self, runtime: Runtime, log: EventLog, examine_files: ExamineFiles, report: FilesReport
    ) -> None:
        self._runtime = runtime
        self._log = log
        self._examine_files = examine_files
        self._report = report
        self._files = dict(report.certificates)
        """Path and validity of the client certificate of each destination."""
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
        self._report, self._files = report, dict(report.certificates)

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
        return {each.destination: each.life for each in self.snapshots() if each.role == "client"}

    def snapshots(self) -> Iterator[CertificateSnapshot]:
        """Yield the state of each certificate."""
        now = datetime.now(UTC)
        for name, running in self._runtime.destinations.items():
            if name in self._files:
                path, validity = self._files[name]
                yield self._snapshot(name, "client", str(path), validity, now)
            if running.endpoint.server_certificate is not None:
                yield self._snapshot(name, "server", "", running.endpoint.server_certificate, now)

    def _snapshot(
        self, name: str, role: str, path: str, validity: Validity, now: datetime
    ) -> CertificateSnapshot:
        life = self._report.certificate_limits.life(validity, now)
        return CertificateSnapshot(name, role, path, validity.ends, life)

    def log_expiring(self) -> None:
        """Log each certificate that is about to expire or has expired: if its state changes, and once a day.

        Refused files are retried first: the fault may be fixed without a change of these files.
        """
        if refused := self._refused & set(self._runtime.destinations):
            self._apply_renewal(refused)
        for each in self.snapshots():
            key, life = (each.destination, each.role), each.life
            step = (life.state, life.days_left)
            if life.state is CertificateState.VALID:
                self._logged.pop(key, None)
            elif self._logged.get(key) != step:
                self._logged[key] = step
                self._log.emit(
                    events.CERTIFICATE_EXPIRING,
                    destination=each.destination,
                    certificate_role=each.role,
                    certificate_state=life.state,
                    days_left=life.days_left,
                    expires_at=each.expires_at,
                    hint=RENEW_HINTS[each.role],
                )

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
            if report and name in report.certificates:
                self._files[name] = report.certificates[name]
            life = self.client_lives().get(name)
            self._log.emit(
                events.CERTIFICATE_RENEWED, destination=name, days_left=life.days_left if life else None
            )
