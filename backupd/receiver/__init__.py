"""The reference endpoint (extra `receiver`): what `demo` and the tests upload to."""
