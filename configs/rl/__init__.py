"""Runs of reinforcement learning (`t5x_like rl`)."""
