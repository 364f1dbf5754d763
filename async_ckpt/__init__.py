"""Asynchronous background checkpoint writer for PyTorch training."""
