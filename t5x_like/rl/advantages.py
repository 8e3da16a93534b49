"""Advantages of answers within their groups, on the host and in float64: before the step, which knows no groups.

The group of a prompt is all that it is compared with, so that advantages depend on no batch.
"""

import numpy as np
from jaxtyping import Float

from t5x_like.rl.config import AdvantageConfig


def advantages(
    rewards: Float[np.ndarray, "prompts samples"], config: AdvantageConfig
) -> Float[np.ndarray, "prompts samples"]:
    """(r - mean) / (std + epsilon) over the samples of each prompt; 0 in a group whose rewards are all equal.

    >>> config = AdvantageConfig(scale="std", ddof=1, epsilon=1e-4)
    >>> advantages(np.array([[1.0, 0.0], [0.5, 0.5]]), config).round(3).tolist()
    [[0.707, -0.707], [0.0, 0.0]]
    """
    rewards = rewards.astype(np.float64)
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    centered[~spread(rewards)] = 0.0  # equal numbers may differ from their mean in the last bit
    if config.scale == "none":
        return centered
    return centered / (rewards.std(axis=1, ddof=config.ddof, keepdims=True) + config.epsilon)


def spread(rewards: Float[np.ndarray, "prompts samples"]) -> np.ndarray:
    """[prompts]: whether the answers to a prompt differ in their rewards; a group without spread teaches nothing."""
    return rewards.max(axis=1) > rewards.min(axis=1)
