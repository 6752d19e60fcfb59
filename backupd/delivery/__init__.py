"""From a claimed delivery to a committed result, and the disposition and retention of the files."""
