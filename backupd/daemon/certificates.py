"""The certificates of all destinations: new files are taken up, and what expires is told in time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from backupd.config.files import ExamineFiles, FilesReport, days_left
from backupd.core.errors import BackupdError, ConfigError
from backupd.daemon.runtime import Runtime
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_TOLD_AT = (1, 3, 7, 14, 30)
"""Days before the end at which it is told."""


class Certificates:
    """Looks after the certificates; `tick` is called every few seconds, `tell` at each heartbeat."""

    def __init__(self, parts: Runtime, log: EventLog, examine: ExamineFiles, found: FilesReport) -> None:
        self._parts = parts
        self._log = log
        self._examine = examine
        self._expires = dict(found.expires)
        self._changing: set[str] = set()
        self._told: dict[tuple[str, str], int] = {}
        self._refused: set[str] = set()

    def tick(self) -> None:
        """Take up what was renewed: once its files rest, as a key comes a moment after its certificate."""
        parts = self._parts.destinations
        changing = {name for name, part in parts.items() if part.tls_context.files_changed()}
        rested = (self._changing - changing) & set(parts)
        self._changing = changing
        if rested:
            self._take_up(rested)

    def update(self, found: FilesReport) -> None:
        """Note what an examination found."""
        self._expires = dict(found.expires)

    def days_left(self) -> Mapping[str, int]:
        """Return the whole days left of each destination's client certificate."""
        now = datetime.now(UTC)
        return {
            name: days_left(end, now)
            for name, end in self._expires.items()
            if name in self._parts.destinations
        }

    def log_expiring(self) -> None:
        """Tell of each certificate that has come to fewer days than was told of it before.

        What was refused is tried again: the fault may have been mended beside the files.
        """
        if refused := self._refused & set(self._parts.destinations):
            self._take_up(refused)
        now = datetime.now(UTC)
        for name, whose, end in self._all():
            days = days_left(end, now)
            step = next((step for step in _TOLD_AT if days < step), None)
            if step is not None and self._told.get((name, whose)) != step:
                self._log.emit(
                    events.CERTIFICATE_EXPIRING,
                    destination=name,
                    certificate_role=whose,
                    days_left=days,
                    expires_at=end,
                    hint="renew the files that `cert` and `key` name; they are taken up by themselves"
                    if whose == "client"
                    else "tell whoever runs the destination",
                )
            if step is None:
                self._told.pop((name, whose), None)
            else:
                self._told[name, whose] = step

    def _all(self) -> Iterator[tuple[str, str, datetime]]:
        for name, part in self._parts.destinations.items():
            if name in self._expires:
                yield name, "client", self._expires[name]
            if part.tls_context.server_expires is not None:
                yield name, "server", datetime.fromtimestamp(part.tls_context.server_expires, UTC)

    def _take_up(self, names: set[str]) -> None:
        try:
            found = self._examine()
        except ConfigError:
            found = None  # the configuration is being edited; the certificates may be good all the same
        for name in sorted(names):
            fatal = [p for p in found.fatal if p.where.startswith(f"destination.{name}.")] if found else []
            try:
                if fatal:
                    raise ConfigError("; ".join(p.message for p in fatal), fatal[0].hint)
                self._parts.destinations[name].tls_context.reload()
            except BackupdError as error:
                self._log.emit(
                    events.CERTIFICATE_REFUSED, destination=name, error=error.message, hint=error.hint
                )
                self._refused.add(name)
                continue
            self._refused.discard(name)
            if found and name in found.expires:
                self._expires[name] = found.expires[name]
            self._log.emit(events.CERTIFICATE_RENEWED, destination=name, days_left=self.days_left().get(name))
