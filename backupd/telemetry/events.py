"""The catalogue of events: every line that the daemon can log; `docs/events.md` is made from it."""

from __future__ import annotations

from dataclasses import dataclass

KEYS = {
    "timestamp": "when, RFC 3339 in UTC",
    "level": "debug, info, warning or error",
    "event": "which event",
    "version": "of backupd",
    "pid": "of the daemon",
    "config": "path of the configuration file",
    "drop": "name of the drop folder in the configuration",
    "path": "absolute path of a folder or file",
    "observer": "inotify or polling",
    "filesystem": "type of the filesystem",
    "archive": r"path of the archive relative to its drop folder; bytes that are no UTF-8 as \xNN",
    "size": "bytes of the archive",
    "digest": "algorithm:hex of the content",
    "destination": "name of the destination in the configuration",
    "destinations": "names of the destinations that the archive goes to",
    "delivery_id": "the delivery, and the Idempotency-Key of all its requests",
    "attempt": "number of the request made for the delivery, from 1",
    "sent": "bytes of the archive that were handed to the connection",
    "duration_s": "seconds that it took",
    "rate": "bytes per second",
    "http_status": "what the destination answered",
    "verified": "false only where the configuration asks for no receipt",
    "reason": "a fixed word for why",
    "error": "the same in words",
    "hint": "what to do about it",
    "exception": "the stack trace of a bug, without the values of variables",
    "moved_to": "path of the file now, relative to its drop folder",
    "disposition": "moved, deleted, kept, or gone",
    "retry_at": "when it is tried again",
    "paused_for_s": "seconds for which the destination gets nothing",
    "down_for_s": "seconds since the destination's first failure in a row",
    "faults": "the destination's failures in a row",
    "pending": "deliveries not ended",
    "pending_bytes": "bytes of the archives of pending deliveries",
    "oldest_s": "age in seconds of the oldest pending archive",
    "found": "files found",
    "candidates": "files that are not stable yet",
    "released": "claims of a daemon that ended in the middle",
    "undisposed": "delivered or rejected archives whose file is still to be moved",
    "restored": "archives that were put away and are known again",
    "unknown": "files in `sent_dir` and `rejected_dir` that no record tells of",
    "in_flight": "uploads under way",
    "signal": "name of the signal",
    "clean": "whether every upload ended within the grace",
    "gates": "state of each destination's gate",
    "delivered": "archives delivered since the last heartbeat",
    "delivered_bytes": "bytes delivered since the last heartbeat",
    "rejected": "archives rejected since the last heartbeat",
    "uptime_s": "seconds since the start",
    "logger": "the library's logger",
    "lost": "lines that could not be written",
    "drops_changed": "names of the drops that began, ended or began anew",
    "destinations_changed": "names of the destinations that began, ended or began anew",
    "thread": "which thread",
    "step_s": "seconds by which the clock was set, negative where it was set back",
    "silent_s": "seconds without a sign of life",
    "whose": "client or server",
    "expires_at": "when the certificate ends",
    "device": "whom the archive comes from, by `expect.by`; left out for a drop as a whole",
    "last_at": "when its last archive was admitted; left out if none ever was",
    "overdue_s": "seconds since it should have come",
    "median_size": "bytes in the middle of the last ten archives of the device",
    "change": "difference from that as a fraction of it: -0.5 for half of it",
    "oldest_each": "age in seconds of each destination's oldest pending archive, 0 where none is pending",
    "archives_per_s": "archives delivered a second since the last heartbeat",
    "quarantined": "rejected archives that are in quarantine now",
    "overdue": "devices from which nothing came for too long, as things stand",
    "blind": "drop folders that tell of nothing by themselves, so that only the scan finds archives there",
    "days_left": "whole days until the client certificate ends; of each destination in a heartbeat",
    "memory_bytes": "resident memory of the daemon",
    "open_files": "descriptors that the daemon has open",
    "open_files_most": "descriptors that the daemon may have open",
    "gate": "open, paused or probing",
    "free_bytes": "bytes that are free on the filesystem",
    "min_free_bytes": "bytes that `min_free` asks for",
}
"""What each key means; an event uses some of them."""


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of line: its name, level, the keys it may have beside the first three, and its meaning."""

    name: str
    level: str
    keys: tuple[str, ...]
    meaning: str


def _event(name: str, level: str, keys: str, meaning: str) -> Event:
    event = Event(name, level, tuple(keys.split()), meaning)
    CATALOGUE[name] = event
    return event


CATALOGUE: dict[str, Event] = {}

DAEMON_STARTED = _event(
    "daemon.started", "info", "version pid config path", "the daemon begins; `path` is its state_dir"
)
DAEMON_READY = _event(
    "daemon.ready", "info", "duration_s pending released undisposed", "ledger, watchers and workers stand"
)
DAEMON_HEARTBEAT = _event(
    "daemon.heartbeat",
    "info",
    "uptime_s pending pending_bytes oldest_s oldest_each in_flight gates delivered delivered_bytes rejected"
    " rate archives_per_s quarantined days_left overdue blind memory_bytes open_files open_files_most",
    "still alive, and how things stand, first at the start; its absence is an alarm",
)
DAEMON_STOPPING = _event(
    "daemon.stopping", "info", "signal in_flight", "told to stop; uploads get `shutdown_grace`"
)
DAEMON_STOPPED = _event("daemon.stopped", "info", "duration_s clean pending", "the daemon ends")
DAEMON_FAILED = _event(
    "daemon.failed", "error", "error hint exception", "a part of the daemon broke; it ends, for a restart"
)
CONFIG_WARNING = _event("config.warning", "warning", "path error hint", "usable, but worth a look")
CONFIG_RELOADED = _event(
    "config.reloaded", "info", "config drops_changed destinations_changed", "a new configuration is in force"
)
CONFIG_REFUSED = _event(
    "config.refused",
    "error",
    "config error hint",
    "a new configuration can't be used; the old one stays in force",
)
DAEMON_HUNG = _event(
    "daemon.hung",
    "error",
    "thread silent_s hint",
    "a thread shows no life; systemd is told nothing, and restarts it",
)
CLOCK_SET = _event(
    "clock.set",
    "warning",
    "step_s hint",
    "the host's clock was set, by more than a second at once; a host that slept is no such thing",
)
CERTIFICATE_RENEWED = _event(
    "certificate.renewed",
    "info",
    "destination days_left",
    "new certificate files are in use from the next archive on",
)
CERTIFICATE_REFUSED = _event(
    "certificate.refused",
    "error",
    "destination error hint",
    "new certificate files can't be used; the last good ones stay in use",
)
CERTIFICATE_EXPIRING = _event(
    "certificate.expiring",
    "warning",
    "destination whose days_left expires_at hint",
    "a certificate ends in fewer than 30, 14, 7, 3 or 1 days; told again at every start",
)
LEDGER_REPLACED = _event(
    "ledger.replaced",
    "error",
    "path error hint",
    "the ledger was damaged and put aside, or gone, and is begun anew from the folders",
)
LEDGER_RESTORED = _event(
    "ledger.restored",
    "info",
    "drop path restored unknown",
    "a ledger that was begun anew knows again what lies in sent_dir and rejected_dir, but for the unknown"
    " files, which have no record",
)
LEDGER_INCOMPLETE = _event(
    "ledger.incomplete",
    "warning",
    "drop path error hint",
    "not all can be read of what lies in sent_dir or rejected_dir, by which a history is completed; it is"
    " tried again every hour",
)
LEDGER_FAILED = _event(
    "ledger.failed", "error", "error hint", "the ledger can't be used now; it is tried again"
)

DROP_WATCHED = _event(
    "drop.watched", "info", "drop path observer filesystem reason", "a drop folder is being watched"
)
DROP_SCANNED = _event(
    "drop.scanned", "debug", "drop found candidates duration_s", "a scan of a drop folder ended"
)
DROP_FAILED = _event(
    "drop.failed", "error", "drop path error hint", "a drop folder can't be read; tried at each rescan"
)
WATCHER_BLIND = _event(
    "watcher.blind",
    "warning",
    "drop path reason error hint",
    "events were or may have been missed; the scan finds them",
)
WATCHER_RESTORED = _event("watcher.restored", "info", "drop path observer", "events come again")
DROP_OVERDUE = _event(
    "drop.overdue",
    "warning",
    "drop device last_at overdue_s",
    "nothing came of it for longer than `expect.every`; said at each heartbeat until something does",
)
DROP_RECOVERED = _event(
    "drop.recovered",
    "info",
    "drop device last_at",
    "what was overdue has come, was forgotten, or is expected no longer",
)

ARCHIVE_ADMITTED = _event(
    "archive.admitted",
    "info",
    "drop archive size destinations",
    "a finished archive was noticed and recorded",
)
ARCHIVE_IGNORED = _event(
    "archive.ignored",
    "warning",
    "drop archive size reason error hint",
    "something in a drop folder is no archive; said once",
)
ARCHIVE_SUPERSEDED = _event(
    "archive.superseded",
    "info",
    "drop archive size destination delivery_id error",
    "the file changed before it was delivered; it starts over",
)
ARCHIVE_GONE = _event(
    "archive.gone",
    "warning",
    "drop archive size destination delivery_id error",
    "the file was removed before every destination had it; there is nothing left to deliver",
)
ARCHIVE_DELIVERED = _event(
    "archive.delivered",
    "info",
    "drop archive size digest destinations verified duration_s",
    "every destination has it, verified and committed; said once per content",
)
ARCHIVE_REJECTED = _event(
    "archive.rejected",
    "error",
    "drop archive size digest destination reason error hint http_status delivery_id",
    "a destination will never have it; it goes to quarantine; said once per content",
)
ARCHIVE_DISPOSED = _event(
    "archive.disposed",
    "info",
    "drop archive disposition moved_to",
    "what became of the file after its last delivery",
)
DISPOSITION_FAILED = _event(
    "disposition.failed",
    "error",
    "drop archive error hint",
    "the file could not be moved or deleted; tried again",
)
ARCHIVE_UNUSUAL_SIZE = _event(
    "archive.unusual_size",
    "warning",
    "drop archive device size median_size change",
    "its size differs from the usual by `size_alarm` or more; it is delivered as ever",
)
ARCHIVE_EXPIRED = _event(
    "archive.expired",
    "info",
    "drop archive path size reason",
    "a delivered archive was removed from `sent_dir`: too_old, too_many or disk_low; no reason after a crash",
)
DISK_LOW = _event(
    "disk.low",
    "error",
    "drop path free_bytes min_free_bytes error hint",
    "less than `min_free` is free, and there is no sent archive left to remove; told again while it lasts",
)
ARCHIVE_WAITING = _event(
    "archive.waiting",
    "warning",
    "drop archive size reason error hint",
    "a file is not sent as it looks truncated or damaged, its checksum file is missing or wrong, or it has "
    "been written to, or held open, for an hour; said once per content and reason",
)
INSPECTION_ENDED = _event(
    "inspection.ended",
    "debug",
    "drop archive size error",
    "an archive is sent without having been inspected to its end",
)

ATTEMPT_FAILED = _event(
    "attempt.failed",
    "warning",
    "drop archive destination delivery_id attempt reason error hint http_status sent duration_s",
    "one request did not bring the archive to the destination",
)
DELIVERY_VERIFIED = _event(
    "delivery.verified",
    "info",
    "drop archive size digest destination delivery_id attempt http_status verified duration_s rate",
    "the destination's receipt matches what was sent",
)
DELIVERY_DEFERRED = _event(
    "delivery.deferred",
    "warning",
    "drop archive destination delivery_id reason retry_at",
    "it will be tried again later",
)
DESTINATION_PAUSED = _event(
    "destination.paused",
    "error",
    "destination reason error hint faults paused_for_s down_for_s",
    "the destination is at fault and gets nothing for a while; no archive is charged",
)
DESTINATION_RESUMED = _event(
    "destination.resumed", "info", "destination down_for_s", "the destination answers again"
)
DESTINATION_STATUS = _event(
    "destination.status",
    "info",
    "destination gate pending pending_bytes oldest_s days_left",
    "how things stand with a destination, after each heartbeat",
)
LIBRARY_WARNING = _event("library.warning", "warning", "logger error", "a library has something to say")
LOG_LOST = _event("log.lost", "error", "lost", "log lines could not be written; this is the first one again")
