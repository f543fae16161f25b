"""A regular package: one that the harnesses bring along is called `tests` too, and would win."""
