"""The embedded models and data sets; no code."""
