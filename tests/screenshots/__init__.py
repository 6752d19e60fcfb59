"""Pictures for the documentation: `python -m tests.screenshots`."""
