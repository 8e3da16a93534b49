"""What is left of an example that is longer than its row: config.data.truncate.

The rule keeps something to train on: inputs give way first, until a minimum of target tokens has room.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from t5x_like.data.config import TruncateConfig


@dataclasses.dataclass(frozen=True)
class Cut:
    """How many examples lost tokens of their inputs, of their targets, or were left out; `targets`: tokens of the
    targets that all rows hold."""

    inputs: int = 0
    targets: int = 0
    examples: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        """
        >>> str(Cut(inputs=5, targets=2, examples=6))
        '6 examples do not fit a row: 5 lose tokens of their inputs, 2 of their targets'
        """
        if self.dropped:
            return f"{self.dropped} examples do not fit a row and are left out"
        return (
            f"{self.examples} examples do not fit a row: {self.inputs} lose tokens of their inputs, "
            f"{self.targets} of their targets"
        )

    def __bool__(self) -> bool:
        return bool(self.examples or self.dropped)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Examples cut to their rows; of those left out nothing is read.

    inputs, targets: tokens that are kept; skipped: tokens at the begin of the inputs that are not read
    """

    inputs: Int[np.ndarray, "examples"]
    targets: Int[np.ndarray, "examples"]
    skipped: Int[np.ndarray, "examples"]
    kept: Bool[np.ndarray, "examples"]
    cut: Cut


def fit(
    inputs: Int[np.ndarray, "examples"], targets: Int[np.ndarray, "examples"], width: int, config: TruncateConfig
) -> Fitted:
    """Cuts examples of so many tokens to `width` for both together.

    >>> cut = TruncateConfig(rule="cut", inputs="left", min_targets=3)
    >>> fitted = fit(np.array([9, 2, 1]), np.array([4, 8, 2]), 8, cut)
    >>> fitted.inputs.tolist(), fitted.targets.tolist(), fitted.skipped.tolist()
    ([5, 2, 1], [3, 6, 2], [4, 0, 0])
    """
    if config.rule == "end":
        inputs_kept = np.minimum(inputs, width)
        targets_kept = np.minimum(targets, width - inputs_kept)
    else:
        least = min(config.min_targets or max(width // 2, 1), width)
        targets_kept = np.minimum(targets, np.maximum(width - inputs, least))
        inputs_kept = np.minimum(inputs, width - targets_kept)
    return _fitted((inputs, targets), (inputs_kept, targets_kept), config)


def fit_apart(
    inputs: Int[np.ndarray, "examples"],
    targets: Int[np.ndarray, "examples"],
    widths: tuple[int, int],
    config: TruncateConfig,
) -> Fitted:
    """The same with a row for each part, so that neither takes the room of the other."""
    return _fitted((inputs, targets), (np.minimum(inputs, widths[0]), np.minimum(targets, widths[1])), config)


def _fitted(
    whole: tuple[np.ndarray, np.ndarray], left: tuple[np.ndarray, np.ndarray], config: TruncateConfig
) -> Fitted:
    lost = [before > after for before, after in zip(whole, left, strict=True)]
    long = lost[0] | lost[1]
    if config.rule == "drop":
        return Fitted(*whole, np.zeros_like(whole[0]), ~long, Cut(dropped=int(long.sum())))
    from_left = config.rule == "cut" and config.inputs == "left"
    skipped = whole[0] - left[0] if from_left else np.zeros_like(whole[0])
    return Fitted(*left, skipped, np.ones_like(long), Cut(*(int(part.sum()) for part in (*lost, long))))
