"""What is known of the kernels without a GPU: compiled code, and calls for a memory checker."""
