"""Generators of the embedded data sets, and other tools. They import minprefix; nothing imports
them."""
