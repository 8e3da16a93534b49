"""Floor 7: reinforcement learning: prompts, rollouts, rewards, and the batches that they become."""
