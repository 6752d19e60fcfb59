"""The daemon: assembly from the configuration, main loop, threads and periodic work."""
