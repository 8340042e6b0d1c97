"""Local news, each note with a one-sentence summary."""
