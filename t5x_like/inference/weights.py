"""Weights as decoding reads them: matrices once in the compute type, where training keeps float32 masters.

Every matrix is rounded to the compute type at use (layers/weights.py), so that results are the same bit for bit, and
each token reads half of the bytes where computation is in bfloat16. Norms and biases stay: they are used in float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec, Tree
from t5x_like.layers import stack
from t5x_like.layers.platform import platform
from t5x_like.models.model import Model
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import constrain, use_rules


def in_dtype(specs: Tree, dtype: str) -> dict[str, Any]:
    """The specs with matrices in `dtype`: what is multiplied with hidden states, or is looked up to become one."""
    return tree.map_with_path(lambda _, spec: _held(spec, dtype), specs)


def serving_specs(model: Model) -> dict[str, Any]:
    """The specs of the parameters in the types that decoding wants."""
    return in_dtype(model.specs(), model.dtypes.compute)


def serving_params(model: Model, params: Tree) -> dict[str, Any]:
    """The parameters in these types; what has its type already is the same array. Under jit or outside."""
    return tree.map_with_path(lambda _, leaf, spec: leaf.astype(spec.dtype), params, serving_specs(model))


def placed(params: Tree, specs: Tree, *, rules: Rules, dtype: str) -> dict[str, Any]:
    """Plain arrays with matrices in `dtype`, then laid out by `rules`: what a mesh exchanges is the smaller type."""
    with use_rules(rules):
        held = in_dtype(specs, dtype)
        return tree.map_with_path(lambda _, leaf, spec: constrain(leaf.astype(spec.dtype), *spec.axes), params, held)


def for_decoding(model: Model, params: Tree) -> tuple[Model, Tree]:
    """The model and the parameters as a loop over tokens wants them, for any number of calls; what is so already is
    given back as it is.

    On a CPU layers run one by one, each with weights of its own, a copy: a scan copies the weights and the cache of
    each layer out of their stacks, again for every token. Elsewhere nothing is changed.
    """
    if platform() != "cpu":
        return model, params
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, scan=False))
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, stack.Apart))
    done = any(isinstance(leaf, stack.Apart) for leaf in leaves)
    return model, params if done else _apart(params)


@jax.jit
def _apart(params: Tree) -> dict[str, Any]:
    """The parameters with those of all layers as arrays of their own."""
    return {
        name: part if not isinstance(part, Mapping) else stack.apart(part) if name == "layers" else _apart(part)
        for name, part in params.items()
    }


def _held(spec: ParamSpec, dtype: str) -> ParamSpec:
    # All of these have a dim of the model's width, and vectors do not: their one dim has another axis.
    return dataclasses.replace(spec, dtype=dtype) if "embed" in spec.axes else spec
