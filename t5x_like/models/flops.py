"""How many floating-point operations a model needs for one token, counted from its sizes. Nothing is measured here.

Convention (printed once by a run): matrix products only, the head included, a multiply-add being two operations; the
embedding lookup, norms and activations are not counted; attention counts the keys that a token really sees (half of a
causal row, at most a window); training is three times the forward pass; recomputation by remat is not counted.
"""

import dataclasses

from t5x_like.models.config import ModelConfig

CONVENTION = (
    "matrix products incl. head, 2 per multiply-add; attention over the keys seen (causal half, windows); "
    "training = 3 x forward; no lookup, no recomputation"
)


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Of one token, averaged over a row. forward is the sum of the three; train is 3 x forward."""

    weights: float  # products with the layers' weights
    attention: float  # queries with keys, probabilities with values
    head: float  # logits

    @property
    def forward(self) -> float:
        return self.weights + self.attention + self.head

    @property
    def train(self) -> float:
        return 3 * self.forward


def per_token(config: ModelConfig, *, length: int) -> FlopsPerToken:
    c = config
    projections = c.embed * c.head * (2 * c.heads + 2 * c.kv_heads)
    mlp = c.embed * c.mlp * (3 if c.gated else 2)
    attention = sum(4 * c.heads * c.head * keys_seen(length, kind.window) for kind in c.kinds)
    return FlopsPerToken(
        weights=2.0 * c.layers * (projections + mlp), attention=attention, head=2.0 * c.embed * c.vocab_size
    )


def keys_seen(length: int, window: int) -> float:
    """Keys that a query of a causal row sees on average, itself included; window 0 is none.

    >>> keys_seen(4, 0), keys_seen(4, 2)
    (2.5, 1.75)
    """
    reach = min(window, length) if window else length
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length
