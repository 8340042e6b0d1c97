"""Scores of texts, quick ones and those of the official scripts; imports models and data."""
