-- The folder of each drop when the daemon last saw it, so that archives follow a folder when its drop gets another
-- name. The name of a drop, a colon and a path is that of the archives in an earlier folder of the drop.
CREATE TABLE drop_folder (
    drop_name TEXT PRIMARY KEY,
    path      TEXT NOT NULL,
    device    INTEGER,
    inode     INTEGER
) WITHOUT ROWID;
