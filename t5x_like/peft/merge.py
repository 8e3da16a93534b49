"""Weights with their low-rank additions written into them, W + A s B, piece by piece; or taken out again.

The sum is made in float32 and rounded once, to the type that is stored. Taking out is exact only up to that rounding:
what was lost when the sum was stored does not come back.

Legend: L layers, R rank.
"""

import math
import threading
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from t5x_like.peft.attach import Adapter

Region = Sequence[tuple[int, int]]


class Merge:
    """Call it with each piece of each weight. sign: 1 to add, -1 to take out.

    parts: the arrays of the adapter by path, such as `layers/mlp/up/a`; they are small and held whole.
    """

    def __init__(self, adapter: Adapter, parts: Mapping[str, np.ndarray], *, sign: int = 1):
        self._adapter, self._sign = adapter, sign
        self._parts = {path: np.asarray(part, np.float32) for path, part in parts.items()}
        self._lock = threading.Lock()  # pieces come from several threads
        self._weights: set[str] = set()
        self._largest = self._added = self._lost = 0.0

    @property
    def paths(self) -> Collection[str]:
        """Of the weights that are changed."""
        return self._adapter.targets.keys()

    def __call__(self, path: str, region: Region, piece: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The piece of W at `region`, of `dtype` when it is stored."""
        if path not in self._adapter.targets:
            return piece
        addition = self._sign * self._addition(path, region).reshape(piece.shape)
        whole = piece.astype(np.float32) + addition
        stored = whole.astype(dtype)
        lost = stored.astype(np.float64) - (piece.astype(np.float64) + addition)
        with self._lock:
            self._weights.add(path)
            self._largest = max(self._largest, float(np.abs(addition).max(initial=0.0)))
            self._added += float(np.square(addition, dtype=np.float64).sum())
            self._lost += float(np.square(lost).sum())
        return stored

    def report(self) -> str:
        """What was added and what rounding took of it, both as root sums of squares."""
        share = math.sqrt(self._lost / self._added) if self._added else 0.0
        return (
            f"{'added to' if self._sign > 0 else 'taken out of'} {len(self._weights)} weights: at most "
            f"{self._largest:.3g}, of which rounding lost {share:.2g} of the whole"
        )

    def _addition(self, path: str, region: Region) -> np.ndarray:
        target = self._adapter.targets[path]
        a, b, scale = self._parts[f"{path}/a"], self._parts[f"{path}/b"], target.scale_R()
        outer = target.stacked_dims
        inputs = a.ndim - outer - 1
        slices = [slice(*span) for span in region]
        before = tuple(slices[:outer])
        a = a[(*before, *slices[outer : outer + inputs])]
        b = b[(*before, slice(None), *slices[outer + inputs :])]
        if scale.ndim == 2:
            scale = scale[slices[0]]
        scale = scale.reshape(*scale.shape[:-1], *(1,) * (outer - scale.ndim + 1), 1, scale.shape[-1])
        stack, rank = a.shape[:outer], a.shape[-1]
        rows, columns = math.prod(a.shape[outer:-1]), math.prod(b.shape[outer + 1 :])
        return np.matmul(a.reshape(*stack, rows, rank) * scale, b.reshape(*stack, rank, columns))
