"""What is known of this host and process: identity, memory, cores. Everything else may build on it."""
