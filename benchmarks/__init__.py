"""Measurements, their results and their pictures; may import everything, and nothing imports it."""
