"""What the paper compares prefix-tuning with, and how a method is scored; imports all that training
may, and training."""
