"""Checks of the kernels that need no GPU."""
