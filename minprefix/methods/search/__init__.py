"""The search for the best discrete prompt, by gradients."""
