"""Uploads of archives to destinations: the interfaces, the registry of kinds, and a package for each kind."""
