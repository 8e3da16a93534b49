"""Muon: against torch layer by layer, orthogonality, and which leaf is a matrix along which dims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec
from t5x_like.optim.muon import orthogonalize
from t5x_like.optim.optimizers import build

SPECS = {
    "q": ParamSpec((2, 12, 2, 5), "float32", ("layers", "embed", "heads", "head"), ""),
    "o": ParamSpec((2, 2, 5, 12), "float32", ("layers", "heads", "head", "embed"), ""),
    "up": ParamSpec((2, 12, 20), "float32", ("layers", "embed", "mlp"), ""),
}
MATRICES = {"q": (12, 10), "o": (10, 12), "up": (12, 20)}
STEPS = 20


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    layer_scale = np.array([0.01, 1.0])
    return tree.map_with_path(
        lambda _, spec: (rng.normal(size=spec.shape) * layer_scale.reshape([2] + [1] * (len(spec.shape) - 1))).astype(
            np.float32
        ),
        SPECS,
    )


@pytest.mark.parametrize(("scale", "theirs_scale"), [("keller", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_stacked_muon_equals_torch_on_every_layer(config, monkeypatch, scale, theirs_scale, nesterov):
    # torch iterates in bf16, in place on that copy; with a copy in full precision its own code is the reference.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    section = config({"name": "muon", "muon.scale": scale, "muon.nesterov": nesterov, "weight_decay": 0.1})
    optimizer = build(section, specs=SPECS, total_steps=STEPS)
    params = draw(0)
    state = optimizer.init(params)
    # Weights of torch are [out, in].
    theirs = {
        (name, layer): torch.nn.Parameter(torch.tensor(leaf[layer].reshape(MATRICES[name]).T, dtype=torch.float64))
        for name, leaf in params.items()
        for layer in range(2)
    }
    reference = torch.optim.Muon(
        theirs.values(), lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=theirs_scale
    )
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        grads = draw(step + 1)
        updates, state = update(grads, state, params, step)
        before = {key: tensor.detach().clone() for key, tensor in theirs.items()}
        for (name, layer), tensor in theirs.items():
            tensor.grad = torch.tensor(grads[name][layer].reshape(MATRICES[name]).T, dtype=torch.float64)
        reference.step()
        for (name, layer), tensor in theirs.items():
            expected = (tensor.detach() - before[name, layer]).numpy().T
            got = np.asarray(updates[name][layer]).reshape(MATRICES[name])
            assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max() > 0, (name, layer, step)
        params = jax.tree.map(jnp.add, params, updates)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_orthogonalized_matrices_have_singular_values_near_one_at_any_scale(shape, scale):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    x = (u * np.linspace(0.05, 1.0, min(shape))) @ vt
    y = np.asarray(jax.jit(orthogonalize, static_argnames="steps")(jnp.asarray(scale * x, jnp.float32), steps=5))
    singular = np.linalg.svd(y, compute_uv=False)
    assert 0.65 < singular.min() and singular.max() < 1.25
    # The singular vectors are those of x: u^T y v is diagonal.
    turned = u.T @ y @ vt.T
    assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-4


def test_a_zero_gradient_gives_a_zero_update():
    assert not np.asarray(orthogonalize(jnp.zeros((4, 6)), steps=5)).any()


@pytest.mark.parametrize(
    ("axes", "method"),
    [
        (("layers", "embed", "heads", "head"), "muon"),
        (("layers", "embed", "kv_heads", "head"), "muon"),
        (("layers", "heads", "head", "embed"), "muon"),
        (("layers", "embed", "mlp"), "muon"),
        (("layers", "experts", "mlp", "embed"), "muon"),
        (("vocab", "embed"), "adamw"),
        (("positions", "embed"), "adamw"),
        (("layers", "norm"), "adamw"),
        (("layers", "heads", "head"), "adamw"),  # a bias
        (("layers", "mlp"), "adamw"),
        (("layers", "embed", "experts"), "adamw"),  # a router: a vector for each expert
        ((None, "heads"), "adamw"),  # a table of relative positions
    ],
)
def test_matrices_are_told_by_their_axes_and_not_by_their_number_of_dims(config, axes, method):
    spec = ParamSpec(tuple(range(2, 2 + len(axes))), "float32", axes, "")
    optimizer = build(config({"name": "muon"}), specs={"w": spec}, total_steps=1)
    assert optimizer.methods["w"].name == method


def test_the_adamw_part_has_its_own_learning_rate_and_equals_adamw(config):
    specs = {"embed": ParamSpec((6, 4), "float32", ("vocab", "embed"), "")}
    rng = np.random.default_rng(0)
    params, grads = ({"embed": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)} for _ in range(2))
    adam = {"b1": 0.8, "b2": 0.9, "eps": 1e-6}
    muon = build(
        config({"name": "muon", "muon.adam": adam, "muon.adam_multiplier": 0.5, "weight_decay": 0.1}),
        specs=specs,
        total_steps=1,
    )
    adamw = build(config({"adamw": adam, "learning_rate": 5e-3, "weight_decay": 0.1}), specs=specs, total_steps=1)
    one, _ = muon.update(grads, muon.init(params), params, 0)
    other, _ = adamw.update(grads, adamw.init(params), params, 0)
    np.testing.assert_allclose(one["embed"], other["embed"], rtol=1e-6)
