"""Generates texts from prompts. May import prefix and whatever prefix may import."""
