"""Scores of texts: quick ones, and those of the official scripts. May import models and data."""
