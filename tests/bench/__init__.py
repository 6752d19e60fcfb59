"""The real daemon, measured beside what people would use instead: `python -m tests.bench`."""
