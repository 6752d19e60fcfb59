"""Everything that can break, broken on purpose: a part among the tests, a long one in `__main__`."""
