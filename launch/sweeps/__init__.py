"""A sweep: its points, its index, its runs on this machine or elsewhere, and what came of them."""
