-- The drop folder that an archive was found in is known by its inode and its filesystem: the roots of two disks
-- have the same inode. The inodes that are stored already stay valid.

ALTER TABLE archive RENAME COLUMN folder_inode TO folder_id;
