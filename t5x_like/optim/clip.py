"""Clipping of gradients by their global norm. It does not look for NaN or infinity: the train step does."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Gradients = TypeVar("Gradients")


def global_norm(grads: object) -> Float[Array, ""]:
    """The root of the sum of squares of all leaves, in fp32.

    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
    5.0
    """
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip_by_global_norm(grads: Gradients, limit: float | None) -> tuple[Gradients, Float[Array, ""]]:
    """(gradients scaled so that their norm is at most `limit`, their norm before). No limit: None or 0.

    The factor is min(1, limit / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_.

    >>> clipped, norm = clip_by_global_norm({"a": jnp.array([3.0, 4.0])}, 1.0)
    >>> float(norm), clipped["a"].round(3).tolist()
    (5.0, [0.6000000238418579, 0.800000011920929])
    """
    norm = global_norm(grads)
    if not limit:
        return grads, norm
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda grad: (grad * factor).astype(grad.dtype), grads), norm
