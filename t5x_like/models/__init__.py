"""Floor 4: whole models built from layers, and their configs."""
