"""Real servers, each a process on a loopback port, to deliver to over mTLS."""
