-- The drop folder that an archive was found in is known by its inode, which no boot or mount changes. The device
-- number of the archive needed a table with the current number of each folder. 0 is unknown.

ALTER TABLE archive RENAME COLUMN device_number TO folder_inode;
UPDATE archive SET folder_inode = coalesce(
    (SELECT inode FROM folder
        WHERE folder.drop_name = archive.drop_name AND folder.device_number = archive.folder_inode),
    0
);
DROP TABLE folder;
