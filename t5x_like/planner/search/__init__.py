"""Many plans beside each other: which mesh, remat and micro-batches are best."""
