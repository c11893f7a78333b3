"""What the store knows, in RAM: nodes and agents, what of them is where, and which prefix fits a request."""
