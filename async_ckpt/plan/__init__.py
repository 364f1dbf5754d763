"""Which bytes a state becomes, as plain data."""
