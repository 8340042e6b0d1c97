"""Mutated files, states and command lines; `make fuzz`. Read `__main__.py`."""
