"""The file system: the seam, whole files, and the transaction that publishes a checkpoint."""
