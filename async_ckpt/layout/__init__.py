"""Memory side: which bytes, at which offset."""
