"""Reading back: catalog, verification and loads."""
