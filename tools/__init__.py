"""Generators of the embedded data sets; import minprefix, and nothing imports them."""
