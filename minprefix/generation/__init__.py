"""From prompts to texts, plainly and fast; imports all that prefix may, and prefix."""
