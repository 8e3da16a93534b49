"""The feed-forward part of a block: plain (up, activation, down) or gated (activation(gate) * up, down). Not experts.

Legend: B batch, T length, D model, F mlp.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_like.layers.param import ZEROS, param
from t5x_like.layers.weights import einsum, value
from t5x_like.parallel.sharding import constrain


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": _gelu,  # with erf
    "gelu_tanh": _gelu_tanh,  # the approximation: Hugging Face's gelu_new and gelu_pytorch_tanh
    "relu": jax.nn.relu,
    "relu2": _relu2,  # arXiv 2109.08668
}


class Mlp(nnx.Module):
    def __init__(self, *, embed: int, mlp: int, activation: str, gated: bool, bias: bool, init: str, init_down: str):
        self.activation = activation
        if gated:
            self.gate = param((embed, mlp), axes=("embed", "mlp"), init=init)
        self.up = param((embed, mlp), axes=("embed", "mlp"), init=init)
        self.down = param((mlp, embed), axes=("mlp", "embed"), init=init_down)
        if bias:
            if gated:
                self.gate_bias = param((mlp,), axes=("mlp",), init=ZEROS)
            self.up_bias = param((mlp,), axes=("mlp",), init=ZEROS)
            self.down_bias = param((embed,), axes=("norm",), init=ZEROS)
        self.gated, self.biased = gated, bias

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up_BTF = self._project(x_BTD, "up")
        if self.gated:
            gate_BTF = self._project(x_BTD, "gate")
            hidden_BTF = self._activated(gate_BTF, up_BTF)
        else:
            hidden_BTF = self._activated(up_BTF)
        out_BTD = einsum("BTF,FD->BTD", hidden_BTF, self.down)
        return add_bias(out_BTD, self.down_bias) if self.biased else out_BTD

    def _activated(self, *inputs_BTF: jax.Array) -> jax.Array:
        """activation(first) * the others.

        Between the matrix products in float32, said once: casts between every two operations cost the TPU 4% of the
        backward pass and twice its temporaries. The backward pass computes it again from its inputs, which are there
        anyway: nothing of it is stored, unless layers are written out (scan=False) without remat, where the compiler
        may find it to be what the forward pass has.
        """

        def function(*inputs_BTF):
            first_BTF, *others_BTF = (array.astype(jnp.float32) for array in inputs_BTF)
            hidden_BTF = math.prod(others_BTF, start=ACTIVATIONS[self.activation](first_BTF))
            return hidden_BTF.astype(inputs_BTF[0].dtype)

        return jax.checkpoint(function, prevent_cse=False)(*inputs_BTF)

    def _project(self, x_BTD: jax.Array, name: str) -> jax.Array:
        hidden_BTF = einsum("BTD,DF->BTF", x_BTD, getattr(self, name))
        if self.biased:
            hidden_BTF = add_bias(hidden_BTF, getattr(self, f"{name}_bias"))
        return checkpoint_name(constrain(hidden_BTF, "batch", "length", "act_mlp"), f"mlp_{name}")


def add_bias(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """x + bias over the last dims, in the type of x.

    Added in float32, so that the bias's gradient, a sum over all tokens, is one of float32 numbers.
    """
    array = value(bias).astype(jnp.float32)
    return (x.astype(jnp.float32) + array.reshape((1,) * (x.ndim - array.ndim) + array.shape)).astype(x.dtype)
