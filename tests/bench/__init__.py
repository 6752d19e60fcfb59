"""Measure the daemon beside curl and rclone: `python -m tests.bench`."""
