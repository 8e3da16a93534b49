"""Floor 0: types, trees, the config bridge, metrics writers. Imports nothing of the package above it."""
