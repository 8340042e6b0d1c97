"""The prefix, its parametrisations and its files, also those of other systems. May import models,
data and metrics."""
