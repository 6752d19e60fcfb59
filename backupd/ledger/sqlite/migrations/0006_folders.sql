-- The directories that a drop folder has been, by inode, and the device number of each when it was last opened.
CREATE TABLE folder (
    drop_name TEXT    NOT NULL,
    inode     INTEGER NOT NULL,
    device    INTEGER NOT NULL,
    PRIMARY KEY (drop_name, inode)
) WITHOUT ROWID;
