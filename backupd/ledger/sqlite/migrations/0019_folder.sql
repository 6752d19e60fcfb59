-- The folder of each drop when the daemon last saw it, so that archives follow a folder when its drop gets another
-- name. The name of a drop, a colon and a path is that of the archives in an earlier folder of the drop.
CREATE TABLE drop_folder (
    drop_name TEXT PRIMARY KEY,
    path      TEXT NOT NULL,
    device    INTEGER,
    inode     INTEGER
) WITHOUT ROWID;

-- A rejected archive that replaces one of the same name in `rejected_dir` shows that the first one was removed.
CREATE INDEX archive_quarantined ON archive (drop_name, moved_to)
    WHERE state = 'rejected' AND moved_to IS NOT NULL;
UPDATE archive SET moved_to = NULL
    WHERE state = 'rejected' AND moved_to IS NOT NULL AND EXISTS (
        SELECT 1 FROM archive AS later
            WHERE later.state = 'rejected' AND later.moved_to IS NOT NULL AND later.id > archive.id
                AND later.drop_name = archive.drop_name AND later.moved_to = archive.moved_to
    );
