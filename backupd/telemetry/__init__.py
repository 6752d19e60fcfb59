"""What the daemon tells the outside: events, and its state to systemd."""
