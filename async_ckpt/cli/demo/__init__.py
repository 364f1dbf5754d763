"""The demo: a small GPT, trained for real on the Python standard library's sources, checkpointed every few steps."""
