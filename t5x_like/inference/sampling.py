"""From the logits of one position to one token a row: greedy, temperature, top-k, top-p. No loop, no cache.

Each row has its own key, so that what is drawn for a row does not depend on the rows beside it.

Names: B batch (rows), V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 switch these off. Applied in this order: temperature, k, p."""

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature} should be 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} should be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} should be above 0 and at most 1 (off)")


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)


def sample(logits_BV: Float[Array, "B V"], keys_B: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One token id a row. `keys_B` are typed keys, unused when greedy.

    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), jax.random.split(jax.random.key(0), 1), GREEDY).tolist()
    [1]
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    filtered_BV = filter_logits(logits_BV.astype(jnp.float32), sampling)
    return jax.vmap(jax.random.categorical)(keys_B, filtered_BV).astype(jnp.int32)


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, with what top-k and top-p remove at minus infinity.

    Ties at the k-th value are kept; top-p (arXiv 1904.09751) keeps the smallest set whose probability reaches p,
    and so always the most probable token.
    """
    # The largest first: a tiny temperature then sends the others to -inf, not itself to inf.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / sampling.temperature
    vocabulary = logits_BV.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        smallest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
        before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV  # probability of all that is more likely
        keep_BV = (
            jnp.zeros_like(before_BV, bool)
            .at[jnp.arange(len(order_BV))[:, None], order_BV]
            .set(before_BV < sampling.top_p)
        )
        logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
    return logits_BV
