"""What the files of a checkpoint are: bytes and numbers alone, no torch and no I/O."""
