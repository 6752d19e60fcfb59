"""The reference receiver (extra `receiver`): an HTTPS endpoint for `backupd demo` and the tests."""
