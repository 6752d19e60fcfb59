"""Real servers with mTLS, each a process on a loopback port."""
