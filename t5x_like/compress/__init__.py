"""Floor 5: weights in fewer bits, and which of a model's become so."""
