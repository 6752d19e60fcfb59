"""Bringing one archive to one destination; the only package that imports httpx."""
