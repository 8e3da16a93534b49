"""FLOPs of the matrix products in a compiled program, where a TPU's compiler writes each as a convolution.

Two for a multiply-add, padding not counted. Those of two numbers of 8 bits are told apart, since some generations
multiply them twice as fast (core/accelerators.py). Not here: kernels (kernels.py), how often each runs (cost.py).
"""

import collections
import math
import re
from collections.abc import Sequence

import numpy as np

from t5x_like.planner import hlo

# What is multiplied, by the begin of both shapes; "" for all else.
_EIGHT_BITS = {"integers": re.compile(r"[su]8\["), "floats": re.compile(r"f8\w*\[")}
_DIMS = re.compile(r"\[([\d,<=]*)\]")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def flops(module: hlo.Module, instruction: hlo.Instruction, computation: hlo.Computation) -> "collections.Counter[str]":
    """Of an instruction of `computation`, with all that is fused into it, by what is multiplied: "integers" or "floats"
    of 8 bits, "" for what is wider."""
    found: collections.Counter[str] = collections.Counter()
    if instruction.opcode == "fusion":
        called = module.computations[instruction.called("calls")[0]]
        for inner in called.instructions.values():
            found += flops(module, inner, called)
    elif instruction.opcode in ("convolution", "dot"):
        shapes = [computation.instructions[name].shape for name in instruction.operands[:2]]
        kinds = (kind for kind, form in _EIGHT_BITS.items() if all(map(form.match, shapes)))
        found[next(kinds, "")] = _of_product(instruction, shapes)
    return found


def _of_product(instruction: hlo.Instruction, shapes: Sequence[str]) -> int:
    """shapes: of its two operands."""
    left, right, out = _sizes(shapes[0]), _sizes(shapes[1]), _sizes(instruction.shape)
    if instruction.opcode == "dot":
        contracted = _CONTRACTED.search(instruction.attributes)
        dims = [int(dim) for dim in contracted.group(1).split(",") if dim] if contracted else []
        return 2 * math.prod(out) * math.prod(left[dim] for dim in dims)
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        return 0
    of_left, of_right, of_out = labels.groups()
    total = 2 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    window = _window(instruction.attributes)
    for dim in range(len(of_out) - 2):
        place = str(dim)
        fields = {name: values[dim] for name, values in window.items() if dim < len(values)}
        total *= _touched(left[of_left.index(place)], right[of_right.index(place)], out[of_out.index(place)], fields)
    return total


def _sizes(shape: str) -> list[int]:
    found = _DIMS.search(shape)
    return [int(size.lstrip("<=")) for size in found.group(1).split(",") if size] if found else []


def _window(attributes: str) -> dict[str, list[str]]:
    found = _WINDOW.search(attributes)
    parts = (part.split("=") for part in found.group(1).split()) if found else ()
    return {name: values.split("x") for name, values in parts}


def _touched(length: int, size: int, out: int, fields: dict[str, str]) -> int:
    """Pairs of an output and a window's position that meet an element of the input, not padding and no gap.

    >>> _touched(8, 1, 8, {}), _touched(4, 4, 4, {"pad": "3_3", "rhs_reversal": "1"}), _touched(4, 2, 3, {})
    (8, 10, 6)
    >>> _touched(6, 6, 6, {"stride": "5", "lhs_dilate": "6"}), _touched(3, 4, 4, {"lhs_dilate": "2", "rhs_dilate": "3"})
    (6, 3)
    """
    low = int(fields.get("pad", "0_0").split("_")[0])
    stride, gap, step = (int(fields.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    starts = np.arange(out, dtype=np.int64) * stride - low
    # Position w of an output's window is at start + w step; elements of the input are `gap` apart.
    first = np.maximum(0, -(starts // step))
    last = np.minimum(size - 1, ((length - 1) * gap - starts) // step)
    common = math.gcd(step, gap)
    every = gap // common  # so many positions from one element to the next
    offset = (-starts // common * pow(step // common, -1, every)) % every
    met = np.maximum(0, (last - offset) // every - (first - 1 - offset) // every)
    return int(met[starts % common == 0].sum())
