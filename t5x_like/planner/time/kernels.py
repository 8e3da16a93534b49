"""A roofline of Pallas kernels, for which the compiler has no estimate: splash attention's three kernels.

FLOPs follow from what is in the program's text: shapes of the operands, block sizes in the kernel's metadata, and the
table of blocks that it is called with. A kernel computes whole blocks, and skips blocks that the mask leaves empty.
Seconds are FLOPs over the peak of the matrix units, which are filled in multiples of their size, and over EFFICIENCY,
which is an ASSUMPTION: no kernel was measured. Not here: how often a kernel runs (cost.py).

Legend: T query length, S key length, H head size.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from t5x_like.core.accelerators import Generation
from t5x_like.planner.time.schedule import KernelCall

# Share of the peak that the matrix units reach within kernels of attention, where softmax runs between two products.
EFFICIENCY = 0.5

_SPLASH = re.compile(r"splash_(mha|mqa)_(fwd|dq|dkv)")
_FLOAT = re.compile(r"^(?:bf16|f16|f32)\[([\d,]+)\]")
_TABLE = re.compile(r"^s(?:8|16)\[(\d+),(\d+),(\d+)\]")
# Products over a block of T x S with heads of H. forward: logits, output. dq: logits, dP, dQ. dkv: logits, dV, dP, dK;
# fused, dQ besides.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv fused": 5}
# Names of the sizes of a block of queries and of keys in the metadata of each kernel.
_BLOCKS = {"fwd": ("block_q", "block_kv"), "dq": ("block_q_dq", "block_kv_dq"), "dkv": ("block_q_dkv", "block_kv_dkv")}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one execution on one device. flops: those that the kernel computes; seconds: estimated."""

    flops: int
    seconds: float


def roofline(call: KernelCall, row: Generation) -> Roofline | None:
    """None for a kernel that is none of splash attention's, or is called in a way that is not understood."""
    found = _SPLASH.match(call.name)
    if not found:
        return None
    shapes = [[int(size) for size in m.group(1).split(",")] for m in map(_FLOAT.match, call.shapes) if m]
    arrays = [shape for shape in shapes if len(shape) >= 2][:3]
    if len(arrays) < 3:
        return None
    kind = found.group(2)
    q, k, v = arrays
    blocks = _sizes(kind, call.settings, q[-2], k[-2])
    if blocks is None:
        return None
    area = blocks[0] * blocks[1] * _blocks_left(call, kind, q[-2] // blocks[0], k[-2] // blocks[1], blocks)
    products = _PRODUCTS["dkv fused" if kind == "dkv" and call.settings.get("use_fused_bwd_kernel") else kind]
    heads = math.prod(q[:-2])
    size = (q[-1] + v[-1]) / 2  # queries and keys may be of another size than values
    flops = int(2 * products * heads * area * size)
    filled = math.ceil(size / row.mxu) * row.mxu
    return Roofline(flops, flops * filled / size / (row.peak / row.devices) / EFFICIENCY)


def _sizes(kind: str, settings: Mapping[str, Any], length: int, keys: int) -> tuple[int, int] | None:
    sizes = [settings.get(name) for name in _BLOCKS[kind]]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    return min(sizes[0], length), min(sizes[1], keys)  # type: ignore[type-var]


def _blocks_left(call: KernelCall, kind: str, rows: int, columns: int, blocks: tuple[int, int]) -> int:
    """Blocks of a head that the mask leaves something of, as far as the operands say.

    A mask by distance comes with the numbers of its queries, the one array of integers that is neither a table nor
    segments; a full mask has none. A window's table is narrower than the row: of keys, or for dkv of queries.
    """
    table = _TABLE.match(call.shapes[0])
    integers = sum(shape.startswith("s32[") for shape in call.shapes)
    if table is None or integers <= (2 if "segmented" in call.name else 0):
        return rows * columns
    tall, wide = int(table.group(2)), int(table.group(3))
    if kind == "dkv" and tall < rows:
        return count_blocks(columns, rows, (blocks[1], blocks[0]), tall)
    return count_blocks(rows, columns, blocks, wide)


def count_blocks(rows: int, columns: int, blocks: tuple[int, int], width: int) -> int:
    """Blocks that a causal mask leaves, of which a row has at most `width`: a window. Of queries that are a part of
    the row, the mean over all parts.

    >>> count_blocks(4, 4, (1024, 1024), 4), count_blocks(4, 8, (1024, 512), 8), count_blocks(4, 4, (1024, 1024), 2)
    (10, 20, 7)
    """
    tall, wide = blocks
    parts = max(1, columns * wide // (rows * tall))
    seen = sum(min(width, math.ceil((row + 1) * tall / wide), columns) for row in range(rows * parts))
    return round(seen / parts)
