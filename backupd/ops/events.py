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
    "uptime_s pending pending_bytes oldest_s in_flight gates delivered delivered_bytes rejected",
    "still alive, and how things stand; its absence is an alarm",
)
DAEMON_STOPPING = _event(
    "daemon.stopping", "info", "signal in_flight", "told to stop; uploads get `shutdown_grace`"
)
DAEMON_STOPPED = _event("daemon.stopped", "info", "duration_s clean pending", "the daemon ends")
DAEMON_FAILED = _event(
    "daemon.failed", "error", "error hint exception", "a part of the daemon broke; it ends, for a restart"
)
CONFIG_WARNING = _event("config.warning", "warning", "path error hint", "usable, but worth a look")
LEDGER_REPLACED = _event(
    "ledger.replaced",
    "error",
    "path error hint",
    "the ledger was damaged, put aside, and begun anew from the folders",
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
ARCHIVE_WAITING = _event(
    "archive.waiting",
    "warning",
    "drop archive size reason error hint",
    "a finished file is not sent as it looks truncated or damaged, or its checksum file is missing or wrong; "
    "said once per content and reason",
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
LIBRARY_WARNING = _event("library.warning", "warning", "logger error", "a library has something to say")
LOG_LOST = _event("log.lost", "error", "lost", "log lines could not be written; this is the first one again")


def as_markdown() -> str:
    """Return `docs/events.md`."""
    lines = [
        "# Events",
        "",
        "One JSON object a line on standard output. This page is made from the program's own catalogue",
        "(`python -m backupd.ops.events`).",
        "",
        "Every line has `timestamp`, `level` and `event`.",
        "",
        "| event | level | meaning | keys |",
        "|---|---|---|---|",
    ]
    for event in CATALOGUE.values():
        keys = ", ".join(f"`{key}`" for key in event.keys)
        lines.append(f"| `{event.name}` | {event.level} | {event.meaning} | {keys} |")
    lines += ["", "## Keys", "", "| key | meaning |", "|---|---|"]
    lines += [f"| `{key}` | {meaning} |" for key, meaning in KEYS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(as_markdown())
