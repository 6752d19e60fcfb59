"""The catalogue of events: every line that the daemon can log, with its keys, their types and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JsonType = Mapping[str, Any]
"""A type as a JSON Schema."""

TEXT: JsonType = {"type": "string"}
COUNT: JsonType = {"type": "integer", "minimum": 0}
INTEGER: JsonType = {"type": "integer"}
NUMBER: JsonType = {"type": "number"}
FLAG: JsonType = {"type": "boolean"}
TIME: JsonType = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"}
NAMES: JsonType = {"type": "array", "items": TEXT}
CIRCUIT: JsonType = {"enum": ["working", "paused", "probing"]}


def per_destination(value: JsonType) -> JsonType:
    """Return the type of an object that has a value for each destination, with their names as keys."""
    return {"type": "object", "additionalProperties": value}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of log lines: its type, the same in every event, and its meaning."""

    name: str
    type: JsonType
    meaning: str


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of log line.

    `keys` are the keys that a line may have in addition to `COMMON_KEYS`. `message` is the template of its
    sentence, see `telemetry.message`. Of an event that may repeat as long as a trouble lasts, at most `limit`
    lines are logged between two heartbeats with the same values of the keys in `cause`; None is no limit.
    """

    name: str
    level: str
    keys: tuple[str, ...]
    message: str
    meaning: str
    cause: tuple[str, ...] = ()
    limit: int | None = None


COMMON_KEYS = ("timestamp", "level", "event", "message", "host")
"""The keys of every line, in their order."""

KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key("timestamp", TIME, "time of the event, RFC 3339, UTC"),
        Key("level", TEXT, "debug, info, warning or error"),
        Key("event", TEXT, "name of the event"),
        Key("message", TEXT, "the event in one sentence"),
        Key("host", TEXT, "name of the host that runs backupd"),
        Key("version", TEXT, "version of backupd"),
        Key("pid", COUNT, "process id of the daemon"),
        Key("config", TEXT, "path of the configuration file"),
        Key("drop", TEXT, "name of the drop folder in the configuration"),
        Key("path", TEXT, "absolute path of a folder or file, or the key of the configuration"),
        Key("observer", TEXT, "how changes are noticed: inotify or polling"),
        Key("filesystem", TEXT, "type of the filesystem"),
        Key(
            "archive",
            TEXT,
            r"path of the archive relative to its drop folder; bytes that are not UTF-8 as \xNN",
        ),
        Key("size_bytes", COUNT, "size of the archive in bytes"),
        Key("digest", TEXT, "digest of the content, as algorithm:hex"),
        Key("destination", TEXT, "name of the destination in the configuration"),
        Key("destinations", NAMES, "names of the destinations of the archive"),
        Key("delivery_id", TEXT, "id of the delivery, and the Idempotency-Key of all its requests"),
        Key("attempt", COUNT, "number of the attempt of this delivery, from 1"),
        Key("sent_bytes", COUNT, "bytes of the archive that were written to the connection"),
        Key("duration_s", NUMBER, "duration in seconds"),
        Key("bytes_per_s", COUNT, "throughput in bytes per second"),
        Key("http_status", COUNT, "HTTP status of the response"),
        Key("address", TEXT, "IP address and port of the destination or its proxy"),
        Key("listen", TEXT, "address and port of the metrics' server"),
        Key("verified", FLAG, 'whether a receipt was checked; false only with `receipt.digest = "none"`'),
        Key("reason", TEXT, "the cause, one word of a fixed list"),
        Key("error", TEXT, "the cause in words"),
        Key("hint", TEXT, "how to fix it"),
        Key("exception", TEXT, "stack trace of a bug, without the values of variables"),
        Key("user", TEXT, "name of the user who gave the command"),
        Key("until", TIME, "end of the pause; missing if a person has to end it"),
        Key("note", TEXT, "reason for the pause in the user's words"),
        Key("moved_to", TEXT, "new path of the file, relative to its drop folder"),
        Key("disposition", TEXT, "outcome for the file: moved, deleted, kept or missing"),
        Key("retry_at", TIME, "time of the next attempt"),
        Key("paused_for_s", NUMBER, "seconds until the destination is tried again"),
        Key("down_for_s", NUMBER, "seconds since the first of the consecutive failures"),
        Key("failures", COUNT, "consecutive failures of the destination"),
        Key("pending", COUNT, "deliveries that have not ended"),
        Key("pending_bytes", COUNT, "size of the archives of pending deliveries in bytes"),
        Key(
            "pending_by_destination",
            per_destination(COUNT),
            "deliveries that have not ended, per destination",
        ),
        Key("oldest_s", NUMBER, "age of the oldest pending archive in seconds"),
        Key(
            "oldest_s_by_destination",
            per_destination(NUMBER),
            "age of the oldest pending archive in seconds, per destination; 0 if none is pending",
        ),
        Key("found_files", COUNT, "files found by the scan"),
        Key("unfinished_files", COUNT, "files that are not stable yet or are still being examined"),
        Key(
            "released_claims", COUNT, "deliveries claimed by an earlier run and released for another attempt"
        ),
        Key(
            "pending_dispositions",
            COUNT,
            "files of delivered and rejected archives that have not been moved or deleted yet",
        ),
        Key("skipped_files", COUNT, "files in `sent_dir` that the retention rules cannot remove"),
        Key("unknown_files", COUNT, "files in `rejected_dir` that the ledger does not know"),
        Key("blind_spot", TEXT, "why files that are still open for writing can't be detected"),
        Key("problems", COUNT, "files that will not be sent, or not moved, as things are"),
        Key("problem_age_s", NUMBER, "seconds since the first of these problems was found"),
        Key("in_flight", COUNT, "uploads in progress"),
        Key("uploads", NAMES, "some of the uploads in progress: archive, destination and progress"),
        Key("grace_s", NUMBER, "seconds for which uploads in progress are waited for at most"),
        Key("signal", TEXT, "name of the signal"),
        Key("clean", FLAG, "whether all uploads ended within `shutdown_grace`"),
        Key("circuit", CIRCUIT, "state of the destination: working, paused or probing"),
        Key("circuit_by_destination", per_destination(CIRCUIT), "state of each destination"),
        Key("delivered", COUNT, "archives delivered since the last heartbeat"),
        Key("delivered_bytes", COUNT, "bytes delivered since the last heartbeat"),
        Key("rejected", COUNT, "archives rejected since the last heartbeat"),
        Key("archives_per_s", NUMBER, "archives delivered per second since the last heartbeat"),
        Key("uptime_s", NUMBER, "seconds since the start of the daemon"),
        Key("heartbeat_every_s", NUMBER, "`heartbeat_every` in seconds"),
        Key("logger", TEXT, "name of the library's logger"),
        Key("left_out", COUNT, "lines of the same cause that were left out since the last such line"),
        Key("lost_lines", COUNT, "log lines that could not be written"),
        Key("drops_changed", NAMES, "names of the drops that were added, removed or restarted"),
        Key("destinations_changed", NAMES, "names of the destinations that were added, removed or restarted"),
        Key("thread", TEXT, "name of the thread"),
        Key("stable_for_s", NUMBER, "seconds for which a file must be unchanged before its upload"),
        Key("step_s", NUMBER, "seconds by which the clock was stepped; negative if it was set back"),
        Key("stalled_s", NUMBER, "seconds since the thread's last sign of life"),
        Key("certificate_role", TEXT, "client or server"),
        Key("expires_at", TIME, "expiry of the certificate"),
        Key(
            "certificate_state",
            TEXT,
            "valid, expiring, critical or expired, by `certificate_warning` and such",
        ),
        Key("days_left", INTEGER, "whole days until the certificate expires"),
        Key(
            "days_left_by_destination",
            per_destination(INTEGER),
            "whole days until the client certificate expires, per destination",
        ),
        Key("device", TEXT, "sender of the archive, by `expect.by`; missing for a drop as a whole"),
        Key("last_at", TIME, "arrival of the device's last archive; missing if there was none"),
        Key("overdue_s", NUMBER, "seconds since the device's next archive was due"),
        Key("overdue_devices", COUNT, "devices with an overdue archive"),
        Key("median_size_bytes", COUNT, "median size in bytes of the device's last ten archives"),
        Key("change_ratio", NUMBER, "relative difference from the median size; -0.5 is half of it"),
        Key("quarantined", COUNT, "archives in quarantine (`rejected_dir`)"),
        Key("degraded_drops", COUNT, "drop folders without events, where only the rescan finds archives"),
        Key("memory_bytes", COUNT, "resident memory of the daemon in bytes"),
        Key("open_files", COUNT, "open file descriptors of the daemon"),
        Key("open_files_limit", COUNT, "limit of open file descriptors"),
        Key("free_bytes", COUNT, "free bytes on the filesystem"),
        Key("min_free_bytes", COUNT, "bytes that `min_free` keeps free"),
        Key("target", TEXT, "name of the target of notifications in the configuration"),
        Key("kind", TEXT, "kind of the message: problem, rejected, paused, overdue, certificate, recovered"),
        Key("subject", TEXT, "subject of the message"),
        Key("command", TEXT, "path of the program"),
        Key("exit_code", INTEGER, "exit code of the command; negative for the signal that ended it"),
    )
}
"""Every key by its name; schema, pages and the format of lnav are generated from it."""

CATALOGUE: dict[str, Event] = {}
"""Every event by its name."""


def _event(
    name: str,
    level: str,
    keys: str,
    message: str,
    meaning: str,
    *,
    cause: str = "",
    limit: int | None = None,
) -> Event:
    event = Event(name, level, tuple(keys.split()), message, meaning, tuple(cause.split()), limit)
    CATALOGUE[name] = event
    return event


def _repeated(
    name: str, level: str, keys: str, message: str, meaning: str, *, cause: str, limit: int = 8
) -> Event:
    """Return an event of which only some lines are logged if it repeats with the same `cause`."""
    message += "[; {left_out} more like this]"
    return _event(name, level, f"{keys} left_out", message, meaning, cause=cause, limit=limit)


DAEMON_STARTED = _event(
    "daemon.started",
    "info",
    "version pid config path",
    "backupd {version} started with {config}",
    "the daemon starts; `path` is its `state_dir`",
)
DAEMON_START_FAILED = _event(
    "daemon.start_failed",
    "error",
    "config error hint",
    "backupd could not start: {error}",
    "the daemon ends, because its configuration, its ledger or a folder cannot be used; the reasons are also"
    " on standard error, unless that is the same file or the journal",
)
DAEMON_READY = _event(
    "daemon.ready",
    "info",
    "duration_s pending released_claims pending_dispositions",
    "ready after {duration_s}, {pending} pending",
    "ledger, watchers and workers are running",
)
DAEMON_HEARTBEAT = _event(
    "daemon.heartbeat",
    "info",
    "uptime_s heartbeat_every_s pending pending_by_destination pending_bytes oldest_s"
    " oldest_s_by_destination in_flight circuit_by_destination delivered delivered_bytes rejected bytes_per_s"
    " archives_per_s quarantined"
    " days_left_by_destination overdue_devices degraded_drops problems memory_bytes open_files"
    " open_files_limit",
    "heartbeat: {pending} pending[ (oldest {oldest_s})], {in_flight} uploading[, {delivered} newly delivered]"
    "[, {rejected} newly rejected][, {quarantined} in quarantine][, files with problems: {problems}]",
    "the state of the daemon, first right after `daemon.ready`; alert on its absence",
)
DAEMON_STOPPING = _event(
    "daemon.stopping",
    "info",
    "signal in_flight uploads grace_s",
    "stopping[ on {signal}], {in_flight} uploading[, waiting up to {grace_s}]",
    "a stop signal arrived, or `run --once` has ended; uploads get `shutdown_grace` to end",
)
DAEMON_ABORTING = _event(
    "daemon.aborting",
    "info",
    "signal in_flight uploads",
    "aborting {in_flight} uploads[ on {signal}]",
    "`shutdown_grace` is over, or Ctrl-C (`signal`) followed the stop signal; the deliveries stay pending",
)
DAEMON_STOPPED = _event(
    "daemon.stopped",
    "info",
    "duration_s clean pending",
    "stopped after {duration_s}[, {pending} pending]",
    "the daemon ends; `pending` is missing if the ledger could not be read",
)
DAEMON_FAILED = _repeated(
    "daemon.failed",
    "error",
    "error hint exception",
    "internal failure: {error}",
    "an error that backupd has no rule for; if it ended a thread, the daemon stops and systemd restarts it",
    cause="",
)
DAEMON_HUNG = _event(
    "daemon.hung",
    "error",
    "thread stalled_s hint",
    "the thread {thread} has been stalled for {stalled_s}",
    "a thread shows no sign of life; the watchdog of systemd restarts the daemon",
)
CONFIG_WARNING = _event(
    "config.warning",
    "warning",
    "path error hint",
    "{path}: {error}",
    "the configuration works, but needs attention; `path` is the key of the configuration",
)
CONFIG_RELOADED = _event(
    "config.reloaded",
    "info",
    "config drops_changed destinations_changed",
    "{config} was reloaded[, drops changed: {drops_changed}][, destinations changed: {destinations_changed}]",
    "a new configuration is active",
)
CONFIG_REFUSED = _repeated(
    "config.refused",
    "error",
    "config error hint",
    "the new configuration was refused, the previous one stays active: {error}",
    "a new configuration cannot be used; the previous one stays active",
    cause="config",
)
CLOCK_STEPPED = _event(
    "clock.stepped",
    "warning",
    "step_s hint",
    "the clock of the host was stepped by {step_s}",
    "the host's clock was set by more than a second; time that the host was suspended does not count",
)
LIBRARY_WARNING = _repeated(
    "library.warning",
    "warning",
    "logger error",
    "{logger}: {error}",
    "a library logged a warning or an error",
    cause="logger",
)
LOG_LOST = _event(
    "log.lost",
    "error",
    "lost_lines",
    "log lines that could not be written: {lost_lines}",
    "log lines could not be written; this is the first line that could",
)

METRICS_SERVED = _event(
    "metrics.served",
    "info",
    "listen days_left",
    "the metrics are served at {listen}[, certificate: {days_left}]",
    "the metrics' server listens, or its certificate was renewed",
)
METRICS_FAILED = _repeated(
    "metrics.failed",
    "error",
    "path error hint exception",
    "{path}: {error}",
    "the metrics cannot be served or written, and deliveries go on; `path` is the key of the configuration",
    cause="path error",
)
METRICS_RECOVERED = _event(
    "metrics.recovered",
    "info",
    "path",
    "{path} works again",
    "the metrics can be served or written again; `path` is the key of the configuration",
)

CERTIFICATE_RENEWED = _event(
    "certificate.renewed",
    "info",
    "destination days_left",
    "the client certificate of {destination} was renewed[, {days_left}]",
    "new certificate files are used from the next upload on",
)
CERTIFICATE_REFUSED = _event(
    "certificate.refused",
    "error",
    "destination error hint",
    "the certificate files of {destination} cannot be used, and earlier ones stay in use: {error}",
    "new certificate files cannot be used; the last good ones stay in use",
)
CERTIFICATE_EXPIRING = _event(
    "certificate.expiring",
    "warning",
    "destination certificate_role certificate_state days_left expires_at hint",
    "the {certificate_role} certificate of {destination} expires at {expires_at} ({days_left})",
    "a certificate expires within `certificate_warning`; logged once a day, at a new state and at a start",
)

LEDGER_RECREATED = _event(
    "ledger.recreated",
    "error",
    "path error hint",
    "a new ledger was created: {error}",
    "the ledger was damaged and has been renamed, or it was missing; the new one has no history",
)
LEDGER_INCOMPLETE = _event(
    "ledger.incomplete",
    "warning",
    "drop path error hint",
    "a new ledger does not know all devices of {drop} yet: {error}",
    "receipt files that show when a device last sent an archive cannot be used; repeated every hour",
)
LEDGER_FAILED = _repeated(
    "ledger.failed",
    "error",
    "error hint",
    "the ledger cannot be used: {error}",
    "the ledger cannot be used at the moment; retried",
    cause="error",
    limit=1,
)

DROP_WATCHED = _event(
    "drop.watched",
    "info",
    "drop path observer filesystem reason stable_for_s blind_spot",
    "watching {path} with {observer}[ on {filesystem}][; {blind_spot}]",
    "a drop folder is watched",
)
DROP_SCANNED = _event(
    "drop.scanned",
    "debug",
    "drop found_files unfinished_files duration_s",
    "the scan of the drop {drop} found {found_files} files; {unfinished_files} unfinished",
    "the scan of a drop folder ended",
)
DROP_FAILED = _repeated(
    "drop.failed",
    "error",
    "drop path error hint",
    "the drop folder {path} cannot be used: {error}",
    "a drop folder cannot be read or written; retried at each rescan",
    cause="drop",
)
WATCH_DEGRADED = _repeated(
    "watch.degraded",
    "warning",
    "drop path reason error hint",
    "new files in {path} may be noticed only by the rescan: {error}",
    "events were lost or may have been lost; the rescan finds the files",
    cause="drop",
)
WATCH_RECOVERED = _event(
    "watch.recovered",
    "info",
    "drop path observer",
    "new files in {path} are noticed by {observer} again",
    "events arrive again",
)
DROP_OVERDUE = _event(
    "drop.overdue",
    "warning",
    "drop device last_at overdue_s",
    "the next archive[ of {device}] in the drop {drop} is overdue by {overdue_s}[, last one at {last_at}]",
    "no archive arrived within `expect.every`; repeated at each heartbeat until one does",
)
DROP_RECOVERED = _event(
    "drop.recovered",
    "info",
    "drop device last_at",
    "no archive[ of {device}] in the drop {drop} is overdue any more",
    "an overdue archive arrived, or the device is no longer expected",
)
DISK_LOW = _event(
    "disk.low",
    "error",
    "drop path free_bytes min_free_bytes error hint",
    "{path} has {free_bytes} free, less than `min_free` ({min_free_bytes})",
    "less than `min_free` is free and no sent archive is left to remove; repeated while it lasts",
)

ARCHIVE_QUEUED = _event(
    "archive.queued",
    "info",
    "drop archive size_bytes destinations",
    "{archive} was queued for {destinations}",
    "a finished archive was noticed and recorded in the ledger",
)
ARCHIVE_IGNORED = _repeated(
    "archive.ignored",
    "warning",
    "drop archive size_bytes reason error hint",
    "{archive} is ignored: {error}",
    "a file in a drop folder is not an archive; logged once, and then counted by `drop.problem`",
    cause="drop reason",
)
ARCHIVE_WAITING = _repeated(
    "archive.waiting",
    "warning",
    "drop archive size_bytes reason error hint",
    "{archive} is held back: {error}",
    "a file is not sent because it looks truncated or damaged, its checksum file is missing or does not match"
    ", its filesystem has no room left, or it has been open for writing, or had a companion"
    " such as NAME.part, for an hour; logged once per content and reason",
    cause="drop reason",
)
ARCHIVE_SUSPICIOUS = _repeated(
    "archive.suspicious",
    "warning",
    "drop archive size_bytes reason error hint",
    "{archive} was queued although it looks {reason}: {error}",
    "an archive is sent that still looks truncated or damaged at the end of `inspect_grace`, that was on a"
    " full filesystem, or that had a companion such as NAME.part for a day; logged once per content, and then"
    " counted by `drop.problem`",
    cause="drop reason",
)
INSPECTION_NOTED = _event(
    "inspection.noted",
    "info",
    "drop archive size_bytes reason error",
    "{archive} is sent, but note: {error}",
    "an archive is unusual, but not damaged: misnamed (other content than its name indicates, such as"
    " encrypted), empty, or no_tar_end (a tar without its closing blocks)",
)
INSPECTION_ENDED = _event(
    "inspection.ended",
    "debug",
    "drop archive size_bytes error",
    "{archive} is sent without a complete inspection: {error}",
    "an archive is sent although its inspection could not be completed",
)
ARCHIVE_UNUSUAL_SIZE = _event(
    "archive.unusual_size",
    "warning",
    "drop archive device size_bytes median_size_bytes change_ratio",
    "{archive} has an unusual size of {size_bytes}, the median[ of {device}] is {median_size_bytes}",
    "the size differs from the device's median by `size_alarm` or more; the archive is delivered",
)
ARCHIVE_DELIVERED = _event(
    "archive.delivered",
    "info",
    "drop archive size_bytes digest destinations verified duration_s",
    "{archive} was delivered to {destinations}",
    "every destination has the archive, verified and committed; logged once per content",
)
ARCHIVE_REJECTED = _event(
    "archive.rejected",
    "error",
    "drop archive size_bytes digest destination reason error hint http_status delivery_id",
    "{archive} was rejected[ by {destination}]: {error}",
    "the archive cannot be delivered and goes to quarantine; logged once per content; without a"
    " `destination` if it was rejected before any upload",
)
ARCHIVE_SUPERSEDED = _event(
    "archive.superseded",
    "info",
    "drop archive size_bytes destination delivery_id error",
    "{archive} changed before it was delivered[ to {destination}]",
    "the file changed before it was delivered; the new content is delivered instead",
)
ARCHIVE_MISSING = _event(
    "archive.missing",
    "warning",
    "drop archive size_bytes destination delivery_id error",
    "{archive} was removed before it was delivered[ to {destination}]",
    "the file was removed before every destination had it, and was still missing one `rescan_every` later",
)
ARCHIVE_DISPOSED = _event(
    "archive.disposed",
    "info",
    "drop archive disposition moved_to",
    "{archive} was {disposition}[ to {moved_to}]",
    "the file was moved, deleted or kept after its last delivery",
)
DISPOSITION_FAILED = _repeated(
    "disposition.failed",
    "error",
    "drop archive error hint",
    "{archive} cannot be moved or deleted: {error}",
    "the file cannot be moved or deleted; retried",
    cause="drop error",
)
ARCHIVE_EXPIRED = _event(
    "archive.expired",
    "info",
    "drop archive path size_bytes reason",
    "{path} was removed by the retention rules ({reason})",
    "a delivered archive was removed from `sent_dir`: too_old, too_many or disk_low; or the receipt file that"
    " was left of one, with a size of 0",
)
ARCHIVE_UNKNOWN = _event(
    "archive.unknown",
    "warning",
    "path unknown_files hint",
    "files in {path} that the ledger does not know: {unknown_files}",
    "`rejected_dir` has files that `backupd retry` cannot put back, as after the loss of a ledger; repeated"
    " every hour",
)
RETENTION_SKIPPED = _repeated(
    "retention.skipped",
    "warning",
    "drop path skipped_files error hint",
    "files in {path} that the retention rules cannot remove: {error}",
    "files in `sent_dir` have no valid receipt file, have a time in the future, or cannot be read or removed;"
    " repeated with each walk",
    cause="drop",
)

ATTEMPT_FAILED = _repeated(
    "attempt.failed",
    "warning",
    "drop archive destination delivery_id attempt reason error hint http_status sent_bytes address"
    " duration_s",
    "attempt {attempt} to upload {archive} to {destination} failed: {error}",
    "an attempt to upload an archive failed",
    cause="destination reason",
)
DELIVERY_VERIFIED = _event(
    "delivery.verified",
    "info",
    "drop archive size_bytes digest destination delivery_id attempt http_status address verified duration_s"
    " bytes_per_s",
    "{destination} confirmed {archive}[ after {duration_s}]",
    "the destination's receipt matches the bytes that were sent",
)
DELIVERY_DEFERRED = _repeated(
    "delivery.deferred",
    "warning",
    "drop archive destination delivery_id reason retry_at",
    "the upload of {archive} to {destination} will be retried[ at {retry_at}][ ({reason})]",
    "the delivery is retried later",
    cause="destination reason",
)
DESTINATION_PAUSED = _repeated(
    "destination.paused",
    "error",
    "destination reason error hint failures paused_for_s down_for_s",
    "{destination} is paused for {paused_for_s}: {error}",
    "the destination is down or misconfigured and is paused; no archive is rejected for it",
    cause="destination reason",
)
DESTINATION_RESUMED = _repeated(
    "destination.resumed",
    "info",
    "destination down_for_s",
    "{destination} works again[ after {down_for_s}]",
    "the destination works again",
    cause="destination",
)
DESTINATION_STATUS = _event(
    "destination.status",
    "info",
    "destination circuit pending pending_bytes oldest_s days_left certificate_state expires_at",
    "{destination}[ is {circuit}]: {pending} pending ({pending_bytes}[, oldest {oldest_s}])"
    "[, certificate: {days_left}]",
    "the state of a destination, after each heartbeat",
)
DESTINATION_HELD = _event(
    "destination.held",
    "info",
    "destination user until note hint",
    "the uploads to {destination} are held[ by {user}][ until {until}][: {note}]",
    "a person has paused a destination (`backupd pause`); its archives are queued, not uploaded",
)
DESTINATION_RELEASED = _event(
    "destination.released",
    "info",
    "destination",
    "the uploads to {destination} are no longer held",
    "the end of a pause that a person requested, by its time or by `backupd resume`",
)
DROP_HELD = _event(
    "drop.held",
    "info",
    "drop user until note hint",
    "the uploads from the drop {drop} are held[ by {user}][ until {until}][: {note}]",
    "a person has paused a drop (`backupd pause`); its archives are queued, not uploaded",
)
DROP_RELEASED = _event(
    "drop.released",
    "info",
    "drop",
    "the uploads from the drop {drop} are no longer held",
    "the end of a pause that a person requested, by its time or by `backupd resume`",
)
DROP_PROBLEM = _event(
    "drop.problem",
    "warning",
    "drop reason problems problem_age_s archive error hint",
    "problem {reason} in the drop {drop}, files: {problems}[, such as {archive}]: {error}",
    "files in a drop folder will not be sent, or not moved, as things are: one line for each drop and reason,"
    " after each heartbeat for as long as it lasts",
)
DROP_PROBLEM_SOLVED = _event(
    "drop.problem_solved",
    "info",
    "drop reason problems",
    "no file in the drop {drop} has the problem {reason} any more",
    "the last file of a drop with this problem was sent, moved or removed",
)

NOTIFY_SENT = _event(
    "notify.sent",
    "info",
    "target kind subject",
    "{target} was notified: {subject}",
    "a service has taken a message for people",
)
NOTIFY_FAILED = _repeated(
    "notify.failed",
    "error",
    "target error hint",
    "notifications to {target} cannot be sent: {error}",
    "a message could not be sent; it is sent again, brought up to date, and is a problem until then",
    cause="target",
    limit=2,
)
PING_FAILED = _repeated(
    "ping.failed",
    "warning",
    "error hint",
    "the request to `ping_url` failed: {error}",
    "the service that expects a request with each heartbeat did not take one",
    cause="",
    limit=2,
)
HOOK_FAILED = _repeated(
    "hook.failed",
    "error",
    "command exit_code error hint",
    "{command} failed: {error}",
    "the command in `on_event` failed, took too long, or is too slow for the events",
    cause="error",
    limit=2,
)
