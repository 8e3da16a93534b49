"""Floor 1: the mesh, the table of sharding rules, and processes that work together."""
