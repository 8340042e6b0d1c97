"""Tools that check the kernels: their compiled code, without a GPU, and calls for compute-sanitizer
on one."""
