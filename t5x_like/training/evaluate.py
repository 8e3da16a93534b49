"""Evaluation on held-out data inside the loop: sums over all batches, divided once at the end.

What is summed is the objective's business (`Objective.evaluate`); harnesses of whole benchmarks live elsewhere.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.objectives.interface import Batch, Sums

EvaluateFunction = Callable[[Tree, dict[str, Any], Batch], Sums]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """`every_steps`: steps between evaluations, 0 for the last step only; `ema`: of the averaged parameters."""

    every_steps: int
    ema: bool

    def check(self, path: str) -> None:
        if self.every_steps < 0:
            raise UsageError(f"{path}.every_steps={self.every_steps} should be at least 0")


def evaluate(
    function: EvaluateFunction,
    params: Tree,
    frozen: dict[str, Any],
    batches: Iterable[Batch],
    *,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """{name: value} over all batches. Two batches are in flight at most.

    Beside a mean loss of tokens, which come with their bytes, stands `perplexity`, its exponential.
    A value of which there is nothing (bits per byte where the targets hold no byte of text) is left out, never nan.
    None when `stop`, which is asked before each batch, says so.
    """
    totals: dict[str, tuple[float, float]] = {}
    pending: Sums | None = None
    for batch in batches:
        if stop():
            return None
        sums = function(params, frozen, batch)
        _add(totals, pending)
        pending = sums
    _add(totals, pending)
    values = {name: total / weight for name, (total, weight) in totals.items() if weight}
    if "loss" in values and "bits_per_byte" in totals:
        values["perplexity"] = math.inf if values["loss"] > 700 else math.exp(values["loss"])
    return values


def _add(totals: dict[str, tuple[float, float]], sums: Sums | None) -> None:
    for name, (total, weight) in jax.device_get(sums or {}).items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + float(total), before[1] + float(weight))
