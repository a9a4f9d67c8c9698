"""Which value goes where in a network: the one graph that insert and fold look at (see README.md)."""
