"""Which part of a model an operation belongs to, and in which pass it runs, from the name that jax gave it.

Names are paths of scopes, such as `jit(step)/transpose(jvp(layers))/while/body/rematted_computation/mlp/dot_general`.
Regions are named scopes of the model and the step (`jax.named_scope`); passes follow from what jax's transformations
write around them. Not here: what operations cost (cost.py).
"""

import re
from collections.abc import Iterable
from typing import TypeVar

# Scopes by region; the innermost scope of a name decides. Norms of a block count to its attention or MLP.
SCOPES = {
    "embed": "embedding",
    "attention": "attention",
    "cross": "cross attention",
    "mlp": "mlp",
    "layers": "layers",  # what of a layer lies in no branch: cutting weights out of their stack, saving activations
    "final_norm": "head and loss",
    "loss": "head and loss",
    "head": "head and loss",
    "optimizer": "optimizer",
}
REGIONS = (*dict.fromkeys(SCOPES.values()), "rest")
PASSES = ("forward", "recomputed", "backward", "update")

K, V = TypeVar("K"), TypeVar("V", int, float)

_WORD = re.compile(r"[\w.\-]+")


def classify(source: str) -> tuple[str, str]:
    """(region, pass) of an operation of this name; ("rest", "") for one without a name.

    >>> classify("jit(step)/jvp(layers)/while/body/attention/dot_general")
    ('attention', 'forward')
    >>> classify("jit(step)/transpose(jvp(layers))/while/body/checkpoint/rematted_computation/mlp/mul")
    ('mlp', 'recomputed')
    >>> classify("jit(step)/optimizer/mul"), classify("jit(decode_step)/layers/while/body/mlp/mul")
    (('optimizer', 'update'), ('mlp', 'forward'))
    """
    words = _WORD.findall(source)
    region = next((SCOPES[word] for word in reversed(words) if word in SCOPES), "rest")
    if "rematted_computation" in words:
        return region, "recomputed"
    if "transpose" in words and "jvp" in words:
        return region, "backward"
    if "jvp" in words:
        return region, "forward"
    if not source:
        return region, ""
    return region, "update" if region == "optimizer" else "forward" if region != "rest" else ""


def sums(items: Iterable[tuple[K, V]]) -> dict[K, V]:
    """The sum of each key, largest first; no sums of nothing."""
    total: dict[K, V] = {}
    for key, amount in items:
        if amount:
            total[key] = total[key] + amount if key in total else amount
    return dict(sorted(total.items(), key=lambda item: -item[1]))
