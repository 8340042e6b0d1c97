"""Trains a prefix or a model on examples, resumable at any step; may import generation and whatever
generation may import."""
