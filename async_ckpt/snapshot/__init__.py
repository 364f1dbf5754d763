"""Where tensors are copied to, and when."""
