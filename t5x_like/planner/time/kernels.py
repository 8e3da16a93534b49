"""A roofline of Pallas kernels, for which the compiler has no estimate: splash attention's three kernels.

FLOPs follow from what is in the program's text: shapes of the operands, block sizes in the kernel's metadata, and the
table of blocks that it is called with. A kernel computes whole blocks, and skips blocks that the mask leaves empty.

    seconds = max(FLOPs / (EFFICIENCY x peak), bytes / HBM speed) + steps x STEP_SECONDS / cores

The peak is that of the matrix units, with heads padded to LANES. Bytes are what a kernel reads and writes, some of it
anew in every row of blocks; a step is one of the grid, that of an empty block too, and the cores of a device share
them. EFFICIENCY and STEP_SECONDS are ASSUMPTIONS: no kernel was measured. Not here: how often a kernel runs (cost.py).

Legend: T query length, S key length, H head size.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from t5x_like.core.accelerators import Generation
from t5x_like.planner.time.schedule import KernelCall

# Share of the peak that the matrix units reach within a block, where softmax runs between two products. With the time
# of the steps, Llama 8B's three kernels with blocks of 1024 on v5p reach one half of the peak together.
EFFICIENCY = 0.56
# Heads are padded to so many. Not to the 256 of the matrix units of v6e and tpu7x: a published step on rows of 131,072
# tokens (`tools/calibrate`) is shorter than its kernels would be if heads of 128 filled a half of these.
LANES = 128
# What the loop over the grid costs a core for each step: control, and copies that are begun and awaited. An order of
# magnitude that is often told of Pallas kernels on TPUs; JAX's documentation has no figure (docs/pallas at cec06d1).
STEP_SECONDS = 0.35e-6

_SPLASH = re.compile(r"splash_(mha|mqa)_(fwd|dq|dkv)")
_FLOAT = re.compile(r"^(bf16|f16|f32)\[([\d,]+)\]")
_TABLE = re.compile(r"^s(?:8|16)\[(\d+),(\d+),(\d+)\]")
# Products over a block of T x S with heads of H. forward: logits, output. dq: logits, dP, dQ. dkv: logits, dV, dP, dK;
# fused, dQ besides.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv fused": 5}
# Names of the sizes of a block of queries and of keys in the metadata of each kernel.
_BLOCKS = {"fwd": ("block_q", "block_kv"), "dq": ("block_q_dq", "block_kv_dq"), "dkv": ("block_q_dkv", "block_kv_dkv")}
# Arrays of which each kernel reads or writes every block once, and those that it reads anew for every block that is
# computed. forward: q, output; k, v. dq: q, its gradient, that of the output; k, v. dkv: k, v, their gradients; q and
# the gradient of the output; fused, a part of dQ besides.
_ONCE = {"fwd": 2, "dq": 3, "dkv": 4, "dkv fused": 4}
_ANEW = {"fwd": 2, "dq": 2, "dkv": 2, "dkv fused": 3}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one execution on one device. flops: those that the kernel computes; bytes: through HBM; steps: of the grid, on
    each core; seconds: estimated."""

    flops: int
    seconds: float
    bytes: int = 0
    steps: float = 0.0


@dataclasses.dataclass(frozen=True)
class Attention:
    """One execution of one of the kernels on one device.

    kind: of _PRODUCTS. heads: of queries, over all rows of the batch. block: queries and keys of one; grid: blocks of
    queries and of keys. seen: blocks of a head that are computed; steps: of the grid of a head. size: of a head;
    itemsize: bytes of a number.
    """

    kind: str
    heads: int
    block: tuple[int, int]
    grid: tuple[int, int]
    seen: float
    steps: int
    size: float
    itemsize: int = 2

    def roofline(self, row: Generation) -> Roofline:
        flops = int(2 * _PRODUCTS[self.kind] * self.heads * self.block[0] * self.block[1] * self.seen * self.size)
        outer = 1 if self.kind.startswith("dkv") else 0  # the loop within goes over queries, or over keys
        once, anew = self.grid[outer] * self.block[outer], self.seen * self.block[1 - outer]
        numbers = self.heads * self.size * (_ONCE[self.kind] * once + _ANEW[self.kind] * anew)
        steps = self.heads * self.steps * row.devices / row.cores
        filled = math.ceil(self.size / LANES) * LANES / self.size
        computing = flops * filled / (row.peak / row.devices) / EFFICIENCY
        moving = numbers * self.itemsize / (row.hbm_speed / row.devices)
        return Roofline(flops, max(computing, moving) + steps * STEP_SECONDS, round(numbers * self.itemsize), steps)


def roofline(call: KernelCall, row: Generation) -> Roofline | None:
    """None for a kernel that is none of splash attention's, or is called in a way that is not understood."""
    found = _SPLASH.match(call.name)
    if not found:
        return None
    arrays = [m for m in map(_FLOAT.match, call.shapes) if m and m.group(2).count(",") >= 1][:3]
    if len(arrays) < 3:
        return None
    kind = found.group(2)
    q, k, v = ([int(size) for size in m.group(2).split(",")] for m in arrays)
    blocks = _sizes(kind, call.settings, q[-2], k[-2])
    if blocks is None:
        return None
    grid = q[-2] // blocks[0], k[-2] // blocks[1]
    fused = kind == "dkv" and call.settings.get("use_fused_bwd_kernel")
    table = _TABLE.match(call.shapes[0])
    return Attention(
        kind="dkv fused" if fused else kind,
        heads=math.prod(q[:-2]),
        block=blocks,
        grid=grid,
        seen=_blocks_left(call, kind, *grid, blocks),
        steps=int(table.group(2)) * int(table.group(3)) if table else math.prod(grid),
        size=(q[-1] + v[-1]) / 2,  # queries and keys may be of another size than values
        itemsize=4 if arrays[0].group(1) == "f32" else 2,
    ).roofline(row)


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
