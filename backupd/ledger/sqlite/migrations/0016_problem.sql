-- The files that will not be sent, or not moved, as things are; `relpath` is empty for the drop folder itself.
CREATE TABLE problem (
    drop_name TEXT    NOT NULL,
    relpath   BLOB    NOT NULL,
    reason    TEXT    NOT NULL,
    since     INTEGER NOT NULL,
    size      INTEGER,
    files     INTEGER NOT NULL,
    error     TEXT    NOT NULL,
    hint      TEXT    NOT NULL,
    PRIMARY KEY (drop_name, relpath, reason)
) WITHOUT ROWID;
CREATE INDEX problem_oldest ON problem (drop_name, reason, since);

-- How the daemon notices the files of each drop; see `DropState`.
CREATE TABLE drop_state (
    drop_name  TEXT NOT NULL PRIMARY KEY,
    observer   TEXT NOT NULL,
    filesystem TEXT NOT NULL,
    fault      TEXT NOT NULL,
    blind_spot TEXT NOT NULL
) WITHOUT ROWID;
