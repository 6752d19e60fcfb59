-- Times are microseconds since the epoch, UTC. Paths are bytes, relative to the drop folder.

CREATE TABLE archive (
    id          INTEGER PRIMARY KEY,
    drop_name   TEXT    NOT NULL,
    relpath     BLOB    NOT NULL,
    device      INTEGER NOT NULL,
    inode       INTEGER NOT NULL,
    size        INTEGER NOT NULL,
    mtime_ns    INTEGER NOT NULL,
    ctime_ns    INTEGER NOT NULL,
    admitted_at INTEGER NOT NULL,
    state       TEXT    NOT NULL DEFAULT 'pending'
                CHECK (state IN ('pending', 'delivered', 'rejected', 'superseded')),
    digest      TEXT,
    -- 'due' once every delivery has ended, 'done' once the file was moved, deleted or kept in place
    disposition TEXT    CHECK (disposition IN ('due', 'done')),
    disposed_to BLOB,
    -- 1 once the end of the archive was logged, but the disposition of its file failed
    announced   INTEGER NOT NULL DEFAULT 0,
    disposed_at INTEGER,
    -- 1 while this row is the entry of a file in the drop folder, which is not queued again
    live        INTEGER NOT NULL DEFAULT 1
);

CREATE INDEX archive_live ON archive (drop_name, relpath) WHERE live;
CREATE INDEX archive_undisposed ON archive (id) WHERE disposition = 'due';

CREATE TABLE delivery (
    id           TEXT    PRIMARY KEY,
    archive_id   INTEGER NOT NULL REFERENCES archive (id) ON DELETE CASCADE,
    destination  TEXT    NOT NULL,
    size         INTEGER NOT NULL,
    state        TEXT    NOT NULL DEFAULT 'pending'
                 CHECK (state IN ('pending', 'claimed', 'delivered', 'rejected', 'superseded')),
    due_at       INTEGER,
    attempts     INTEGER NOT NULL DEFAULT 0,
    charged      INTEGER NOT NULL DEFAULT 0,
    faults       INTEGER NOT NULL DEFAULT 0,
    ended_at     INTEGER,
    reason       TEXT,
    error        TEXT,
    digest       TEXT,
    verified     INTEGER,
    http_status  INTEGER,
    receipt      TEXT
);

CREATE INDEX delivery_of_archive ON delivery (archive_id);
CREATE INDEX delivery_due ON delivery (destination, due_at) WHERE state = 'pending';
CREATE INDEX delivery_smallest ON delivery (destination, size) WHERE state = 'pending';
CREATE INDEX delivery_newest ON delivery (destination, archive_id) WHERE state = 'pending';
CREATE INDEX delivery_claimed ON delivery (destination) WHERE state = 'claimed';
CREATE INDEX delivery_rejected ON delivery (ended_at) WHERE state = 'rejected';
CREATE INDEX delivery_ended ON delivery (destination, ended_at) WHERE state = 'delivered';

CREATE TABLE attempt (
    delivery_id TEXT    NOT NULL REFERENCES delivery (id) ON DELETE CASCADE,
    number      INTEGER NOT NULL,
    started_at  INTEGER NOT NULL,
    duration_us INTEGER NOT NULL,
    sent        INTEGER NOT NULL,
    outcome     TEXT    NOT NULL,
    reason      TEXT,
    error       TEXT,
    http_status INTEGER,
    PRIMARY KEY (delivery_id, number)
) WITHOUT ROWID;

-- The circuit of each destination after its last change, for `backupd status`.
CREATE TABLE gate (
    destination TEXT PRIMARY KEY,
    state       TEXT    NOT NULL,
    reason      TEXT,
    error       TEXT,
    since       INTEGER,
    until       INTEGER
) WITHOUT ROWID;
