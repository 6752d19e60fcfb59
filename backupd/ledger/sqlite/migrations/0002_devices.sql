-- What each drop is expected to bring; `every` is in microseconds, and null where nothing is expected.
CREATE TABLE expectation (
    drop_name TEXT PRIMARY KEY,
    every     INTEGER,
    device_by TEXT
) WITHOUT ROWID;

-- One row for each device of a drop; '' is the drop as a whole.
CREATE TABLE device (
    drop_name TEXT    NOT NULL,
    name      TEXT    NOT NULL,
    known_at  INTEGER NOT NULL,
    last_at   INTEGER,
    archives  INTEGER NOT NULL DEFAULT 0,
    -- of its last archives, the latest one last, with blanks between
    sizes     TEXT    NOT NULL DEFAULT '',
    -- 1 if the configuration names it
    listed    INTEGER NOT NULL DEFAULT 0,
    -- 1 from when it was said to be overdue until it was said to have recovered
    alarmed   INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (drop_name, name)
) WITHOUT ROWID;

-- Archives of an unusual size, until that was said.
CREATE TABLE unusual_size (
    archive_id  INTEGER PRIMARY KEY REFERENCES archive (id) ON DELETE CASCADE,
    device      TEXT    NOT NULL,
    median_size INTEGER NOT NULL
);

-- What may be forgotten once it is old: nothing that is pending, in its drop folder, or in quarantine.
CREATE INDEX archive_over ON archive (coalesce(disposed_at, admitted_at))
    WHERE disposition = 'done' AND NOT live AND (state <> 'rejected' OR disposed_to IS NULL);
