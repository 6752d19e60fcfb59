"""The log, its catalogue of events, and the state that systemd is notified of."""
