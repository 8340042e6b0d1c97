"""Writes the data set notes."""
