"""The prefix, what it is computed from, and its files, also those of other systems; imports models,
data and metrics."""
