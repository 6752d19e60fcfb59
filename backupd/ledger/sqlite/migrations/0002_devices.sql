-- How often each drop expects an archive of a device; `every` is in microseconds, NULL for no expectation.
-- `device_by` is the template of the device's name, NULL for the drop as a whole.
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
    -- sizes in bytes of its last archives, separated by spaces, the latest one last
    sizes     TEXT    NOT NULL DEFAULT '',
    -- 1 if the configuration lists it
    listed    INTEGER NOT NULL DEFAULT 0,
    -- 1 after it was logged as overdue, until it is logged as recovered
    alarmed   INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (drop_name, name)
) WITHOUT ROWID;

-- Archives of an unusual size that is not logged yet.
CREATE TABLE unusual_size (
    archive_id  INTEGER PRIMARY KEY REFERENCES archive (id) ON DELETE CASCADE,
    device      TEXT    NOT NULL,
    median_size INTEGER NOT NULL
);

-- The archives that may be deleted once they are old: not those that are pending, in their drop folder or in
-- quarantine.
CREATE INDEX archive_over ON archive (coalesce(disposed_at, admitted_at))
    WHERE disposition = 'done' AND NOT live AND (state <> 'rejected' OR disposed_to IS NULL);
