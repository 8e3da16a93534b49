"""How many FLOPs a second a device can do at most: what MFU divides by. What a model needs: models/flops.py.

Peaks are dense bf16, from the vendors' documentation, whatever number format a run computes in.
"""

import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.core.accelerators import GENERATIONS
from t5x_like.parallel import mesh

# Dense bf16 FLOP/s of one jax device by device_kind.
PEAKS: tuple[tuple[str, float], ...] = (
    *((row.kind, row.peak / row.devices) for row in GENERATIONS.values()),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H100 PCIe.*", 756e12),
    (r"NVIDIA H100 NVL.*", 835e12),
    (r"NVIDIA (H100|H200|GH200).*", 989e12),
)


def device_peak(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device, None where the table does not know it.

    >>> device_peak("TPU v5 lite"), device_peak("TPU v5"), device_peak("cpu")
    (197000000000000.0, 459000000000000.0, None)
    """
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, device_kind)), None)


def cpu_matmul_peak(
    device: jax.Device, *, compiler_options: Mapping[str, Any] | None, size: int = 1024, repeats: int = 5
) -> float:
    """fp32 FLOP/s of this machine in its best of a few square matmuls; about 0.3 s on 2 cores.

    `compiler_options`: those of the run, since they choose the library that multiplies.
    """
    multiply = jax.jit(jnp.matmul, compiler_options=dict(compiler_options or {}) or None)
    best = math.inf
    # jit refuses an array on one device where the mesh in context has more.
    with jax.set_mesh(mesh.of_one(device)):
        matrix = jax.device_put(np.ones((size, size), np.float32), device)
        multiply(matrix, matrix).block_until_ready()
        for _ in range(repeats):
            begin = time.perf_counter()
            multiply(matrix, matrix).block_until_ready()
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
