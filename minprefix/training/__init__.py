"""From examples to a trained prefix or model, resumable at any step; imports all that generation
may, and generation."""
