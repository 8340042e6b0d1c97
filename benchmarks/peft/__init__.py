"""Times training steps and generation, and those of transformers + PEFT."""
