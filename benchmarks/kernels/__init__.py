"""The attention operator timed beside what PyTorch offers."""
