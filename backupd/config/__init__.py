"""TOML to frozen models; every problem reported at once, with its path."""
