"""Engines: one a file, all behind one contract."""
