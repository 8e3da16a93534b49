"""Memory of a thread for the pieces that it converts, one after the other: fresh memory for each costs a third of the
time, most of it page faults."""

import math
import threading
from collections.abc import Sequence

import numpy as np

_local = threading.local()


def array(use: str, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array whose contents are undefined, and which the next call of this thread with the same `use` overwrites."""
    buffers: dict[str, np.ndarray] = _local.__dict__.setdefault("buffers", {})
    size = math.prod(shape) * dtype.itemsize
    if use not in buffers or buffers[use].size < size:
        buffers[use] = np.empty(size, np.uint8)
    return buffers[use][:size].view(dtype).reshape(shape)
