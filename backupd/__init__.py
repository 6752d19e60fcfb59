"""Deliver configuration backups from drop folders to HTTPS endpoints, with verified receipts."""

__version__ = "0.2.0"
