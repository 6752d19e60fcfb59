-- The state of the daemon on each host, as JSON; see `Snapshot`.
CREATE TABLE snapshot (
    host     TEXT PRIMARY KEY,
    taken_at INTEGER NOT NULL,
    state    TEXT    NOT NULL
) WITHOUT ROWID;

-- The pauses of destinations and drops that people have requested; `until` is NULL for one without an end.
CREATE TABLE operator_pause (
    kind      TEXT    NOT NULL CHECK (kind IN ('destination', 'drop')),
    name      TEXT    NOT NULL,
    since     INTEGER NOT NULL,
    until     INTEGER,
    user_name TEXT    NOT NULL,
    note      TEXT    NOT NULL,
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;

-- The device that sent the archive, NULL if it was not tracked, and the device's median size if that of the archive
-- was unusual.
ALTER TABLE archive ADD COLUMN device TEXT;
ALTER TABLE archive ADD COLUMN median_size INTEGER;
-- The newest archives of a drop, and those of some days.
CREATE INDEX archive_queued ON archive (drop_name, queued_at);

-- Only the reason of the last failure outlives the daemon; the rest of a circuit is in the snapshot.
CREATE TABLE destination_failure (
    destination TEXT PRIMARY KEY,
    reason      TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO destination_failure SELECT destination, reason FROM circuit WHERE reason IS NOT NULL;
DROP TABLE circuit;
