"""Floor 5: what is minimised, as sums that add over micro-batches."""
