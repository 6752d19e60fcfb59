"""One claimed delivery from end to end, and what becomes of the file."""
