"""Floor 4: families of models, as functions over a nested dict of parameters."""
