"""Adafactor: against transformers and torch, layer by layer, and the shapes of its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec
from t5x_like.optim.optimizers import build

SPECS = {
    "q": ParamSpec((2, 12, 2, 5), "float32", ("layers", "embed", "heads", "head"), ""),
    "up": ParamSpec((2, 12, 9), "float32", ("layers", "embed", "mlp"), ""),
    "scale": ParamSpec((2, 12), "float32", ("layers", "norm"), ""),
}
# The matrix of one layer as an independent implementation wants it.
MATRICES = {"q": (12, 10), "up": (12, 9), "scale": (12,)}
STEPS = 20


def draw(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    layer_scale = np.array([0.01, 1.0])

    def leaf(_, spec):
        x = scale * rng.normal(size=spec.shape)
        return (x * layer_scale.reshape([2] + [1] * (len(spec.shape) - 1))).astype(np.float32)

    return tree.map_with_path(leaf, SPECS)


def compare(config, changes: dict, make, tolerance: float) -> None:
    section = config({"name": "adafactor", "adafactor.min_dim_size_to_factor": 2, **changes})
    optimizer = build(section, specs=SPECS, total_steps=STEPS)
    params, state = draw(0, 0.5), None
    state = optimizer.init(params)
    theirs = {
        (name, layer): torch.nn.Parameter(torch.tensor(leaf[layer].reshape(MATRICES[name]), dtype=torch.float64))
        for name, leaf in params.items()
        for layer in range(2)
    }
    reference = make(theirs.values())
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        grads = draw(step + 1, 10.0 ** np.sin(step))
        updates, state = update(grads, state, params, step)
        before = {key: tensor.detach().clone() for key, tensor in theirs.items()}
        for (name, layer), tensor in theirs.items():
            tensor.grad = torch.tensor(grads[name][layer].reshape(MATRICES[name]), dtype=torch.float64)
        reference.step()
        for (name, layer), tensor in theirs.items():
            expected = (tensor.detach() - before[name, layer]).numpy()
            got = np.asarray(updates[name][layer]).reshape(MATRICES[name])
            assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max() > 0, (name, layer, step)
        params = jax.tree.map(jnp.add, params, updates)


@pytest.mark.parametrize("scaled", [True, False])
def test_stacked_adafactor_equals_transformers_on_every_layer(config, scaled):
    compare(
        config,
        {"adafactor.min_scale": 1e-3 if scaled else None},
        lambda tensors: Adafactor(
            list(tensors), lr=1e-2, scale_parameter=scaled, relative_step=False, warmup_init=False
        ),
        3e-6,
    )


def test_momentum_equals_transformers(config):
    compare(
        config,
        {"adafactor.momentum": 0.9, "adafactor.min_scale": None},
        lambda tensors: Adafactor(list(tensors), lr=1e-2, beta1=0.9, scale_parameter=False, relative_step=False),
        3e-6,
    )


def test_stacked_adafactor_with_decay_equals_torch_on_every_layer(config):
    compare(
        config,
        {"weight_decay": 0.1},
        lambda tensors: torch.optim.Adafactor(tensors, lr=1e-2, beta2_decay=-0.8, weight_decay=0.1),
        3e-6,
    )


def state_shapes(config, spec: ParamSpec) -> dict:
    optimizer = build(config({"name": "adafactor"}), specs={"w": spec}, total_steps=1)
    params = {"w": jax.ShapeDtypeStruct(spec.shape, spec.dtype)}
    shapes = tree.flatten(jax.eval_shape(optimizer.init, params))
    axes = tree.flatten(optimizer.state_axes({"w": spec}))
    return {path: (leaf.shape, axes[path]) for path, leaf in shapes.items()}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            ParamSpec((3, 130, 140), "float32", ("layers", "embed", "mlp"), ""),
            {"row/w": ((3, 130), ("layers", "embed")), "col/w": ((3, 140), ("layers", "mlp"))},
        ),
        (  # a larger number of layers than either side, which optax would factor over
            ParamSpec((200, 130, 140), "float32", ("layers", "embed", "mlp"), ""),
            {"row/w": ((200, 130), ("layers", "embed")), "col/w": ((200, 140), ("layers", "mlp"))},
        ),
        (
            ParamSpec((3, 128, 2, 64), "float32", ("layers", "embed", "heads", "head"), ""),
            {"row/w": ((3, 128), ("layers", "embed")), "col/w": ((3, 2, 64), ("layers", "heads", "head"))},
        ),
        (
            ParamSpec((3, 4, 128, 256), "float32", ("layers", "experts", "embed", "mlp"), ""),
            {
                "row/w": ((3, 4, 128), ("layers", "experts", "embed")),
                "col/w": ((3, 4, 256), ("layers", "experts", "mlp")),
            },
        ),
        (  # one side too small
            ParamSpec((3, 127, 256), "float32", ("layers", "embed", "mlp"), ""),
            {"full/w": ((3, 127, 256), ("layers", "embed", "mlp"))},
        ),
        (
            ParamSpec((300, 200), "float32", ("layers", "norm"), ""),
            {"full/w": ((300, 200), ("layers", "norm"))},
        ),
        (
            ParamSpec((512, 128), "float32", ("vocab", "embed"), ""),
            {"row/w": ((512,), ("vocab",)), "col/w": ((128,), ("embed",))},
        ),
    ],
)
def test_statistics_drop_one_side_of_each_matrix(config, spec, expected):
    assert state_shapes(config, spec) == expected | {"count": ((), ())}
