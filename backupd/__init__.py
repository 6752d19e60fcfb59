"""Delivers archives from drop folders to HTTPS endpoints, verified, exactly once."""

__version__ = "0.1.0"
