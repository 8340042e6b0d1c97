"""Times the kernels and compares them with what PyTorch offers."""
