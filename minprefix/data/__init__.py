"""Data sets, how a table becomes text, and batches; imports models."""
