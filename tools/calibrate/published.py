"""What follows from a published figure: FLOPs a token in the row's convention, and seconds a step.

FLOPs are those of matrix products, 2 a multiply-add, three times the forward pass (6 a parameter and token); the head
counts and the lookup of the embedding does not. Attention's two products of a forward pass need 4 x layers x heads x
head size x keys FLOPs a token: all keys of the row ("full"), or half ("causal"). "parameters" is 6 x all parameters,
the embedding too, and no attention. A layer with a window counts it in place of the row, halved like this if causal.
"""

from t5x_like.core import accelerators
from tools.calibrate.rows import CONVENTIONS, SHAPES, Row, Shape


def matrix_parameters(shape: Shape) -> int:
    """Numbers in the matrices that every token is multiplied with, the head included."""
    attention = 2 * shape.width * shape.head * (shape.heads + shape.kv_heads)
    mlp = shape.width * shape.mlp * (3 if shape.gated else 2)
    return shape.layers * (attention + mlp) + shape.width * shape.vocab


def flops_per_token(shape: Shape, length: int, convention: str) -> float:
    """Of training, in a convention of CONVENTIONS."""
    assert convention in CONVENTIONS, convention
    weights = 6.0 * matrix_parameters(shape)
    if convention == "parameters":
        return weights + (0 if shape.tied else 6.0 * shape.width * shape.vocab)
    reach = [min(window, length) if window else length for window in shape.windows]
    keys = sum(reach) / len(reach) / (1 if convention == "full" else 2)
    return weights + 12.0 * shape.layers * shape.heads * shape.head * keys


def tokens_per_chip(row: Row) -> float:
    return row.batch * row.length / row.chips


def step_seconds(row: Row) -> float:
    """Seconds of a step by the first figure that the row gives: its time, tokens a second, TFLOP/s, MFU."""
    if row.step_seconds is not None:
        return row.step_seconds
    if row.tokens is not None:
        return tokens_per_chip(row) / row.tokens
    flops = tokens_per_chip(row) * flops_per_token(SHAPES[row.model], row.length, row.convention)
    if row.tflops is not None:
        return flops / (row.tflops * 1e12)
    assert row.mfu is not None, f"{row.name} publishes no figure"
    return flops / (row.mfu * accelerators.GENERATIONS[row.chip].peak)


def mfu(row: Row, seconds: float, convention: str = "full") -> float:
    """Model FLOPs a second over the peak, of a step that takes so long."""
    flops = tokens_per_chip(row) * flops_per_token(SHAPES[row.model], row.length, convention)
    return flops / seconds / accelerators.GENERATIONS[row.chip].peak
