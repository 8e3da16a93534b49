"""The platform that a program is compiled for (cpu, gpu, tpu). Layers ask it where one result has several forms: which
kernel, which precision of matrix products."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import get_abstract_mesh

from t5x_like.parallel import sharding


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in context (a planner lowers for a TPU on a CPU), else jax's default."""
    device = get_abstract_mesh().abstract_device
    return jax.devices()[0].platform if device is None else device.platform


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """What products of this type need so that float32 means float32: TPUs round operands to bfloat16 otherwise, GPUs to
    TF32. None on a CPU, whose products are exact to the type.

    For products whose gradient is written out; `Model.apply` sets the same for all others (`float32_products`).
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 and platform() != "cpu" else None


def in_order(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, which on a TPU lies in memory as its dims are written, the last one innermost. axes: the logical ones of x.

    Said of what passes from layer to layer, which the TPU's compiler would lay out for its first user, transposed, and
    copy for the others: 6% of the cycles of an 8B train step that saves its products (docs/log.md). Each device says it
    of its own part: said of the whole, the compiler gathers x to every device where another dim than the first is cut.
    """
    if platform() != "tpu" or not isinstance(x, Tracer):
        return x

    def placed(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    if sharding.nothing_to_place():
        return placed(x)
    spec, names = sharding.activation_spec(axes, x.shape), set(sharding.free_axis_sizes())
    return jax.shard_map(placed, in_specs=spec, out_specs=spec, axis_names=names, check_vma=False)(x)


def float32_products(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """Within it every product is as `matmul_precision` says. Gradients of products keep it, outside of it too; those
    that a custom rule multiplies do not."""
    return contextlib.nullcontext() if matmul_precision(dtype) is None else jax.default_matmul_precision("highest")


def compute_capability() -> float | None:
    """Of the NVIDIA GPUs of this process, such as 9.0 for Hopper; None where there is none, or a planner stands in."""
    if get_abstract_mesh().abstract_device is not None and platform() != jax.devices()[0].platform:
        return None
    text = getattr(jax.local_devices()[0], "compute_capability", None)
    return None if text is None else float(text)
