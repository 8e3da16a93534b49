"""Optimizers as wholes: against torch over 20 steps, one table that they learn, what state is, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.optimization import get_cosine_schedule_with_warmup

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ParamSpec
from t5x_like.optim.clip import clip_by_global_norm
from t5x_like.optim.optimizers import OPTIMIZERS, build, describe

SHAPES = {
    "embed/tokens": ((16, 8), ("vocab", "embed")),
    "layers/attention/q": ((3, 8, 2, 4), ("layers", "embed", "heads", "head")),
    "layers/attention/o": ((3, 2, 4, 8), ("layers", "heads", "head", "embed")),
    "layers/mlp/up": ((3, 8, 12), ("layers", "embed", "mlp")),
    "layers/norm/scale": ((3, 8), ("layers", "norm")),
    "experts/up": ((2, 2, 8, 12), ("layers", "experts", "embed", "mlp")),
    "final_norm/scale": ((8,), ("norm",)),
}
SPECS = tree.unflatten({path: ParamSpec(shape, "float32", axes, "") for path, (shape, axes) in SHAPES.items()})
STEPS = 20


def draw(seed: int, specs=SPECS) -> dict:
    rng = np.random.default_rng(seed)
    return tree.map_with_path(lambda _, spec: rng.normal(size=spec.shape).astype(np.float32), specs)


def run(optimizer, params, gradients, clip_norm=None) -> tuple[dict, list[dict]]:
    """Parameters after all gradients, and every update."""

    @jax.jit
    def step(params, state, grads, index):
        grads, _ = clip_by_global_norm(optimizer.mask(grads), clip_norm)
        updates, state = optimizer.update(grads, state, params, index)
        return jax.tree.map(jnp.add, params, updates), state, updates

    state, history = optimizer.init(params), []
    for index, grads in enumerate(gradients):
        params, state, updates = step(params, state, grads, index)
        history.append(updates)
    assert int(state["count"]) == len(gradients)
    return params, history


def assert_updates_equal(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Per step and leaf: max|a - b| <= tolerance * max|b|."""
    for one, other in zip(ours, theirs, strict=True):
        for path, update in tree.leaves(one):
            reference = np.asarray(tree.flatten(other)[path])
            assert np.abs(reference).max() > 0, path
            assert np.abs(np.asarray(update) - reference).max() <= tolerance * np.abs(reference).max(), path


def torch_updates(make, params, gradients, *, clip_norm=None, schedule=None, no_decay=(), dtype=torch.float64):
    """Updates that an optimizer of torch makes; in double precision, where they are a difference of parameters."""
    tensors = {path: torch.nn.Parameter(torch.tensor(leaf, dtype=dtype)) for path, leaf in tree.leaves(params)}
    plain = [tensor for path, tensor in tensors.items() if path in no_decay]
    decayed = [tensor for path, tensor in tensors.items() if path not in no_decay]
    groups = [{"params": decayed}] + ([{"params": plain, "weight_decay": 0.0}] if plain else [])
    optimizer = make(groups)
    scheduler = schedule(optimizer) if schedule else None
    if scheduler:  # our first learning rate is the second of transformers
        optimizer.step()
        scheduler.step()
    history = []
    for grads in gradients:
        before = {path: tensor.detach().clone() for path, tensor in tensors.items()}
        for path, grad in tree.leaves(grads):
            tensors[path].grad = torch.tensor(grad, dtype=dtype)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
        history.append(
            tree.unflatten({path: (tensor.detach() - before[path]).numpy() for path, tensor in tensors.items()})
        )
    return {path: tensor.detach().numpy() for path, tensor in tensors.items()}, history


GRADIENTS = [jax.tree.map(lambda g, k=k: g * np.float32(1.0 + 0.8 * np.sin(k)), draw(100 + k)) for k in range(STEPS)]


def test_adamw_with_clipping_schedule_and_decay_equals_torch_over_20_steps(config):
    section = config(
        {
            "weight_decay": 0.1,
            "decay": ((".*/scale", 0.0), (".*", 1.0)),
            "schedule.name": "cosine",
            "schedule.warmup_steps": 5,
            "schedule.cosine.final_fraction": 0.0,
        }
    )
    params = draw(0)
    optimizer = build(section, specs=SPECS, total_steps=STEPS + 1)
    ours, updates = run(optimizer, params, GRADIENTS, clip_norm=20.0)
    norms = [np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads))) for grads in GRADIENTS]
    assert min(norms) < 20 < max(norms)  # some are clipped, by different factors
    arguments = {
        "clip_norm": 20.0,
        "no_decay": {"layers/norm/scale", "final_norm/scale"},
        "schedule": lambda o: get_cosine_schedule_with_warmup(o, 5, STEPS + 1),
    }

    def make(groups):
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)

    _, exact = torch_updates(make, params, GRADIENTS, **arguments)
    assert_updates_equal(updates, exact, 1e-6)
    theirs, _ = torch_updates(make, params, GRADIENTS, **arguments, dtype=torch.float32)
    for path, leaf in tree.leaves(ours):
        np.testing.assert_allclose(leaf, theirs[path], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_torch(config, momentum, nesterov):
    section = config({"name": "sgd", "sgd.momentum": momentum, "sgd.nesterov": nesterov})
    _, updates = run(build(section, specs=SPECS, total_steps=STEPS), draw(0), GRADIENTS)
    _, exact = torch_updates(
        lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=momentum, nesterov=nesterov), draw(0), GRADIENTS
    )
    assert_updates_equal(updates, exact, 1e-6)


def test_lion_equals_the_published_algorithm(config):
    """arXiv 2302.06675, Algorithm 2, in double precision."""
    section = config({"name": "lion", "weight_decay": 0.3})
    _, updates = run(build(section, specs=SPECS, total_steps=STEPS), draw(0), GRADIENTS)
    theta, momentum, exact = draw(0), tree.map_with_path(lambda _, leaf: 0.0 * leaf, draw(0)), []
    for grads in GRADIENTS:
        sign = jax.tree.map(lambda g, m: np.sign(0.9 * m + 0.1 * np.float64(g)), grads, momentum)
        change = jax.tree.map(lambda s, p: -1e-2 * (s + 0.3 * np.float64(p)), sign, theta)
        theta = jax.tree.map(np.add, theta, change)
        momentum = jax.tree.map(lambda g, m: 0.99 * m + 0.01 * np.float64(g), grads, momentum)
        exact.append(change)
    assert_updates_equal(updates, exact, 1e-6)


SMALL = {"adafactor.min_dim_size_to_factor": 4, "weight_decay": 0.1}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_and_experts_learn_as_separate_tensors(config, name):
    """Whatever looks at a whole tensor sees one layer and one expert."""
    section = config({"name": name, **SMALL})
    stacked_axes = {"q": ("layers",), "norm": ("layers",), "up": ("layers", "experts")}
    shapes = {"q": ((4, 2, 3), ("embed", "heads", "head")), "norm": ((4,), ("norm",)), "up": ((4, 6), ("embed", "mlp"))}
    whole, parts = {}, {}
    for leaf, (shape, axes) in shapes.items():
        batch = (2,) * len(stacked_axes[leaf])
        whole[leaf] = ParamSpec(batch + shape, "float32", stacked_axes[leaf] + axes, "")
        parts |= {(leaf, *index): ParamSpec(shape, "float32", axes, "") for index in np.ndindex(batch)}

    def apart(values: dict) -> dict:
        return {"/".join(map(str, key)): values[key[0]][key[1:]] for key in parts}

    def scaled(seed: int) -> dict:  # tensors of different scale, so that mixing them would show
        return {
            leaf: x
            * np.float32(10.0)
            ** np.arange(-3, 2 * 2 ** len(stacked_axes[leaf]) - 3, 2, dtype=np.float32).reshape(
                (2,) * len(stacked_axes[leaf]) + (1,) * len(shapes[leaf][0])
            )
            for leaf, x in draw(seed, whole).items()
        }

    gradients = [scaled(seed) for seed in range(1, 5)]
    stacked, _ = run(build(section, specs=whole, total_steps=4), draw(0, whole), gradients)
    specs = {"/".join(map(str, key)): spec for key, spec in parts.items()}
    separate_optimizer = build(section, specs=tree.unflatten(specs), total_steps=4)
    separate, _ = run(
        separate_optimizer, tree.unflatten(apart(draw(0, whole))), list(map(tree.unflatten, map(apart, gradients)))
    )
    start, expected = apart(draw(0, whole)), tree.flatten(separate)
    for path, leaf in apart(stacked).items():
        assert np.abs(expected[path] - start[path]).max() > 1e-3
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [("adamw", 0.02), ("adafactor", 0.05), ("lion", 0.01), ("muon", 0.02), ("sgd", 0.02)],
)
def test_every_optimizer_fits_a_small_network(config, name, learning_rate):
    rng = np.random.default_rng(0)
    specs = {
        "layers": {"w": ParamSpec((2, 8, 8), "float32", ("layers", "embed", "mlp"), "")},
        "bias": ParamSpec((8,), "float32", ("embed",), ""),
    }
    params = {"layers": {"w": jnp.asarray(0.3 * rng.normal(size=(2, 8, 8)), jnp.float32)}, "bias": jnp.zeros(8)}
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    y = jnp.tanh(x @ jnp.asarray(rng.normal(size=(8, 8)), jnp.float32))

    def loss(params):
        hidden = jnp.tanh(x @ params["layers"]["w"][0] + jnp.broadcast_to(params["bias"], x.shape))
        return jnp.mean((hidden @ params["layers"]["w"][1] - y) ** 2)

    optimizer = build(
        config({"name": name, "learning_rate": learning_rate, "adafactor.min_dim_size_to_factor": 4}),
        specs=specs,
        total_steps=100,
    )

    @jax.jit
    def step(carry, index):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, index)
        return (jax.tree.map(jnp.add, params, updates), state), value

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(100))
    assert losses[-1] < 0.4 * losses[0], losses[::20]


def test_the_schedule_follows_the_step_and_bias_correction_the_updates_made(config):
    """After a skipped update the step has moved on and the state has not."""
    section = config({"schedule.name": "linear"})
    optimizer = build(section, specs=SPECS, total_steps=10)
    params, grads = draw(0), draw(1)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    at_0, _ = update(grads, state, params, 0)
    at_4, _ = update(grads, state, params, 4)
    ratio = float(optimizer.learning_rate(4) / optimizer.learning_rate(0))
    assert ratio == pytest.approx(5 / 9, rel=1e-6)
    for path, update in tree.leaves(at_4):
        np.testing.assert_allclose(update, ratio * tree.flatten(at_0)[path], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_plain_dicts_and_matches_its_axes(config, name):
    optimizer = build(config({"name": name, **SMALL}), specs=SPECS, total_steps=2)
    state = jax.eval_shape(optimizer.init, draw(0))
    axes = optimizer.state_axes(SPECS)
    jax.tree.map(lambda leaf, names: None if len(names) == leaf.ndim else pytest.fail(str(names)), state, axes)
    _, after = jax.eval_shape(optimizer.update, draw(0), state, draw(0), 0)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]

    def no_empty_dict(node):
        if isinstance(node, dict):
            assert node
            list(map(no_empty_dict, node.values()))

    no_empty_dict(state)
    flat = tree.flatten(state)
    parameters = {path for path, _ in tree.leaves(SPECS)}
    slots = {path.partition("/")[0] for path in flat} - {"count"}
    moments = {f"{slot}/{path}" for slot in slots for path in parameters} & flat.keys()
    assert moments == flat.keys() - {"count"}  # every other leaf of the state is a slot of a parameter


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_moments_lie_as_their_parameters(config, name):
    optimizer = build(config({"name": name}), specs=SPECS, total_steps=2)
    for path, axes in tree.leaves(optimizer.state_axes(SPECS)):
        if path != "count":
            assert axes == tree.flatten(SPECS)[path.partition("/")[2]].axes


def test_a_leaf_that_the_optimizer_was_not_built_for_is_an_error(config):
    optimizer = build(config(), specs=SPECS, total_steps=2)
    flat = tree.flatten(SPECS)
    with pytest.raises(ValueError, match="'layers/extra' is unknown"):
        optimizer.state_axes(tree.unflatten(flat | {"layers/extra": flat["embed/tokens"]}))
    with pytest.raises(ValueError, match="'embed/tokens' is missing"):
        optimizer.init(tree.unflatten({path: leaf for path, leaf in tree.leaves(draw(0)) if path != "embed/tokens"}))
    with pytest.raises(ValueError, match=r"'embed/tokens' has shape \(8, 16\), the optimizer expects \(16, 8\)"):
        optimizer.init(tree.unflatten(tree.flatten(draw(0)) | {"embed/tokens": np.zeros((8, 16), np.float32)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "config.optim.name='adam' is unknown; did you mean 'adamw'?"),
        ({"adamw.b2": 1.0}, "config.optim.adamw.b2=1.0 should be at least 0 and below 1"),
        ({"learning_rate": -1.0}, "config.optim.learning_rate=-1.0 should be at least 0"),
        ({"learning_rate": float("nan")}, "config.optim.learning_rate=nan should be a finite number"),
        ({"name": "muon", "muon.scale": "rsm"}, "config.optim.muon.scale='rsm' is unknown; known: keller, rms"),
        ({"name": "muon", "muon.adam.b1": -0.1}, "config.optim.muon.adam.b1=-0.1 should be at least 0 and below 1"),
        ({"name": "adafactor", "adafactor.clip_threshold": 0.0}, "clip_threshold=0.0 should be above 0"),
        ({"name": "sgd", "sgd.momentum": 1.5}, "config.optim.sgd.momentum=1.5 should be at least 0 and below 1"),
    ],
)
def test_values_out_of_bounds_are_refused_in_one_line(config, changes, message):
    with pytest.raises(UsageError) as error:
        build(config(changes), specs=SPECS, total_steps=2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_moments_and_updates_are_fp32_whatever_parameters_are_stored_as(config):
    specs = {"w": ParamSpec((4, 4), "bfloat16", ("embed", "mlp"), "")}
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    optimizer = build(config(), specs=specs, total_steps=2)
    updates, state = optimizer.update(params, optimizer.init(params), params, 0)
    assert updates["w"].dtype == state["mu"]["w"].dtype == jnp.float32


def test_description_names_method_values_and_rules(config):
    section = config(
        {
            "name": "muon",
            "weight_decay": 0.1,
            "decay": ((".*/scale", 0.0), (".*", 1.0)),
            "multiplier": (("layers/.*", (0.25, 0.5, 1.0)), (".*", 1.0)),
            "freeze": (("embed/.*", True), (".*", False)),
            "muon.adam_multiplier": 0.5,
        }
    )
    text = describe(build(section, specs={name: SPECS[name] for name in ("embed", "layers")}, total_steps=2))
    expected = """
parameter           method  decay             multiplier                       frozen          slots
embed/tokens        adamw   0.1 by .*         0.5 by .*                        yes by embed/.* mu[16, 8] nu[16, 8]
layers/attention/o  muon    0.1 by .*         [0.25 0.5 1] by layers/.*        no by .*        mu[3, 2, 4, 8]
layers/attention/q  muon    0.1 by .*         [0.25 0.5 1] by layers/.*        no by .*        mu[3, 8, 2, 4]
layers/mlp/up       muon    0.1 by .*         [0.25 0.5 1] by layers/.*        no by .*        mu[3, 8, 12]
layers/norm/scale   adamw   0 by .*/scale     [0.125 0.25 0.5] by layers/.*    no by .*        mu[3, 8] nu[3, 8]
"""
    assert [line.split() for line in text.splitlines()] == [line.split() for line in expected.strip().splitlines()]
