"""The decisions of backupd as pure functions and values: no I/O, no clock, no threads."""
