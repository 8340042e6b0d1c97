"""Writes the data set restaurants."""
