"""The engine and its checkpoints in flight."""
