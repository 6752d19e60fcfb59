-- Each directory that a drop folder was, by its number on its disk, and the number that the disk had then.
CREATE TABLE folder (
    drop_name TEXT    NOT NULL,
    inode     INTEGER NOT NULL,
    device    INTEGER NOT NULL,
    PRIMARY KEY (drop_name, inode)
) WITHOUT ROWID;
