"""A gradient-guided search for the best discrete prompt."""
