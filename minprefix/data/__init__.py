"""Data sets, how a table becomes text, and batches. May import models."""
