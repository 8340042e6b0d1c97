"""Measurements, their results and figures. May import everything; nothing imports it."""
