"""Weights as decoding reads them: matrices once in the compute type, where training keeps float32 masters.

Every matrix is rounded to the compute type at use (layers/weights.py), so that results are the same bit for bit, and
each token reads half of the bytes where computation is in bfloat16. Norms and biases stay: they are used in float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec, Tree
from t5x_like.layers import stack
from t5x_like.models.model import Model


def in_dtype(specs: Tree, dtype: str) -> dict[str, Any]:
    """The specs with matrices in `dtype`: what is multiplied with hidden states, or is looked up to become one."""
    return tree.map_with_path(lambda _, spec: _held(spec, dtype), specs)


def serving_specs(model: Model) -> dict[str, Any]:
    """The specs of the parameters in the types that decoding wants."""
    return in_dtype(model.specs(), model.dtypes.compute)


def serving_params(model: Model, params: Tree) -> dict[str, Any]:
    """The parameters in these types; what has its type already is the same array. Under jit or outside."""
    return tree.map_with_path(lambda _, leaf, spec: leaf.astype(spec.dtype), params, serving_specs(model))


def one_by_one(model: Model) -> Model:
    """The same model, whose layers run one by one and not scanned: on a CPU, where a scan copies the weights and the
    cache of each layer out of their stacks for every token."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, scan=False))


def apart(params: Tree) -> dict[str, Any]:
    """The parameters with all layers as arrays of their own, for a loop over tokens in which they run one by one."""
    return {
        name: part if not isinstance(part, Mapping) else stack.apart(part) if name == "layers" else apart(part)
        for name, part in params.items()
    }


def _held(spec: ParamSpec, dtype: str) -> ParamSpec:
    # All of these have a dim of the model's width, and vectors do not: their one dim has another axis.
    return dataclasses.replace(spec, dtype=dtype) if "embed" in spec.axes else spec
