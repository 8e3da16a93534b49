"""Which weights become int8, and over which dims each is summed: all matrices of attention and MLP, embedding and head.

Norms, biases, learned positions, token types, position biases and routers stay as they are: they are small, and an
error in them reaches everything. A table of the vocabulary has one scale a token, for the lookup as for the head.
"""

from t5x_like.core import tree
from t5x_like.core.types import Axes, ParamSpec, Tree

# Regex over paths -> the axes that a product sums; () for what is not quantized. First match.
CONTRACTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(.*/)?layers/(attention|cross)/[qkv]", ("embed",)),
    (r"(.*/)?layers/(attention|cross)/o", ("heads", "head")),
    (r"(.*/)?layers/mlp/(gate|up)", ("embed",)),
    (r"(.*/)?layers/mlp/down", ("mlp",)),
    (r"embed/tokens|head/weight", ("embed",)),
    (r".*", ()),
)


def dims(specs: Tree) -> dict[str, tuple[int, ...]]:
    """Path -> the dims over which a weight is summed, for those that become int8."""
    flat = tree.flatten(specs)
    chosen = tree.match_rules(CONTRACTED, flat, where="compress/choice.py", all_used=False)
    return {path: _dims(flat[path], axes) for path, axes in chosen.items() if axes}


def _dims(spec: ParamSpec, contracted: Axes) -> tuple[int, ...]:
    found = tuple(dim for dim, axis in enumerate(spec.axes) if axis in contracted)
    assert len(found) == len(contracted), (spec, contracted)
    return found
