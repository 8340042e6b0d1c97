"""Training steps and generation timed beside transformers + PEFT."""
