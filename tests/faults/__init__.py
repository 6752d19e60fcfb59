"""Fault injection: a part runs among the tests, the long part is `python -m tests.faults`."""
