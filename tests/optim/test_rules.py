"""Rules by path: which parameter they hit, values per layer on stacked arrays, freezing, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ParamSpec
from t5x_like.optim.clip import clip_by_global_norm
from t5x_like.optim.optimizers import OPTIMIZERS, build
from t5x_like.optim.rules import frozen_paths, resolve

SHAPES = {
    "embed/tokens": ((6, 4), ("vocab", "embed")),
    "final_norm/scale": ((4,), ("norm",)),
    "layers/attention/q": ((3, 4, 2, 2), ("layers", "embed", "heads", "head")),
    "layers/attention/q_bias": ((3, 2, 2), ("layers", "heads", "head")),
    "layers/mlp/up": ((3, 4, 6), ("layers", "embed", "mlp")),
    "layers/mlp_norm/scale": ((3, 4), ("layers", "norm")),
}
SPECS = tree.unflatten({path: ParamSpec(shape, "float32", axes, "") for path, (shape, axes) in SHAPES.items()})


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return tree.map_with_path(lambda _, spec: rng.normal(size=spec.shape).astype(np.float32), SPECS)


def updates(optimizer, steps: int = 3, clip_norm: float | None = None) -> list[dict]:
    """Flat updates of every step from fixed gradients."""

    @jax.jit
    def step(params, state, grads, index):
        grads, _ = clip_by_global_norm(optimizer.mask(grads), clip_norm)
        changes, state = optimizer.update(grads, state, params, index)
        return jax.tree.map(jnp.add, params, changes), state, changes

    chosen = lambda values: tree.split(values, lambda path: path in optimizer.specs)[0]  # noqa: E731
    params = chosen(draw(0))
    state, history = optimizer.init(params), []
    for index in range(steps):
        params, state, changes = step(params, state, chosen(draw(index + 1)), index)
        history.append({path: np.asarray(change) for path, change in tree.leaves(changes)})
    return history


def test_which_rule_hits_which_parameter(config):
    """Golden: the default rules and a few of each kind. Change it only with the rules."""
    section = config(
        {
            "weight_decay": 0.1,
            "decay": ((".*(norm|bias|scale).*", 0.0), (".*", 1.0)),
            "multiplier": (("embed/.*", 0.1), ("layers/.*", (0.25, 0.5, 1.0)), (".*", 1.0)),
            "freeze": (("layers/attention/.*", (True, False, False)), (".*", False)),
        }
    )
    got = {
        path: f"decay {rules.decay} multiplier {np.ravel(rules.multiplier).tolist()} "
        f"frozen {np.ravel(rules.frozen).tolist()}"
        for path, rules in resolve(section, SPECS).items()
    }
    assert got == {
        "embed/tokens": "decay 0.1 multiplier [0.1] frozen [False]",
        "final_norm/scale": "decay 0.0 multiplier [1.0] frozen [False]",
        "layers/attention/q": "decay 0.1 multiplier [0.25, 0.5, 1.0] frozen [True, False, False]",
        "layers/attention/q_bias": "decay 0.0 multiplier [0.25, 0.5, 1.0] frozen [True, False, False]",
        "layers/mlp/up": "decay 0.1 multiplier [0.25, 0.5, 1.0] frozen [False]",
        "layers/mlp_norm/scale": "decay 0.0 multiplier [0.25, 0.5, 1.0] frozen [False]",
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layerwise_multipliers_and_decay_scale_each_layer(config, name):
    """A layer with multiplier m and decay factor d learns as under learning_rate x m and weight_decay x d."""
    common = {"name": name, "weight_decay": 0.1}
    factors, decays = (0.25, 0.5, 2.0), (0.0, 1.0, 3.0)
    layerwise = {
        "multiplier": (("layers/.*", factors), (".*", 1.0)),
        "decay": (("layers/.*", decays), (".*", 1.0)),
    }
    (got,) = updates(build(config(common | layerwise), specs=SPECS, total_steps=1), steps=1)
    for layer, (factor, decay) in enumerate(zip(factors, decays, strict=True)):
        alone = config(common | {"learning_rate": 1e-2 * factor, "weight_decay": 0.1 * decay})
        (expected,) = updates(build(alone, specs=SPECS, total_steps=1), steps=1)
        for path in SHAPES:
            if path.startswith("layers/"):
                np.testing.assert_allclose(got[path][layer], expected[path][layer], rtol=1e-6, atol=1e-9)
                assert np.abs(got[path][layer]).max() > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_layers_stay_exactly_and_the_others_learn_as_if_alone(config, name):
    """Neither decay nor a NaN gradient moves a frozen layer, nor does its gradient count in the norm."""
    common = {"name": name, "weight_decay": 0.1, "adafactor.min_dim_size_to_factor": 4}
    freeze = (("embed/.*", True), ("layers/.*", (True, True, False)), (".*", False))
    section = config(common | {"freeze": freeze})
    assert frozen_paths(section, SPECS) == {"embed/tokens"}
    _, trainable = tree.split(SPECS, lambda path: path == "embed/tokens")
    got = updates(build(section, specs=trainable, total_steps=3, frozen=["embed/tokens"]), clip_norm=0.5)
    last_only = {  # the model that has only the layer that learns
        path: ParamSpec((1, *spec.shape[1:]), "float32", spec.axes, "") if path.startswith("layers/") else spec
        for path, spec in tree.leaves(trainable)
    }
    alone = build(config(common), specs=tree.unflatten(last_only), total_steps=3)
    params = {path: leaf[-1:] if path.startswith("layers/") else leaf for path, leaf in tree.leaves(draw(0))}
    params = tree.unflatten({path: params[path] for path in last_only})
    state = alone.init(params)
    for step, changes in enumerate(got):
        grads = {path: leaf[-1:] if path.startswith("layers/") else leaf for path, leaf in tree.leaves(draw(step + 1))}
        clipped, _ = clip_by_global_norm(tree.unflatten({path: grads[path] for path in last_only}), 0.5)
        expected, state = jax.jit(alone.update)(clipped, state, params, step)
        params = jax.tree.map(jnp.add, params, expected)
        for path, change in changes.items():
            if path.startswith("layers/"):
                assert not change[:2].any() and change[2].any()
            # Muon's iteration enlarges the last bits, in which one matrix and a stack of them may differ.
            rtol = 5e-5 if section.name == "muon" else 1e-5
            np.testing.assert_allclose(change[-1:], tree.flatten(expected)[path][-1:], rtol=rtol, atol=1e-9)


def test_nan_gradients_of_frozen_layers_reach_neither_updates_nor_state(config):
    section = config({"freeze": (("layers/.*", (True, False, False)), (".*", False))})
    optimizer = build(section, specs=SPECS, total_steps=1)
    params, grads = draw(0), draw(1)
    grads["layers"]["mlp"]["up"][0] = np.nan
    changes, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((changes, state)))
    assert not np.asarray(changes["layers"]["mlp"]["up"][0]).any()


def test_per_layer_values_that_freeze_all_layers_freeze_the_leaf(config):
    section = config({"freeze": (("layers/mlp/.*", (True, True, True)), (".*", False))})
    assert frozen_paths(section, SPECS) == {"layers/mlp/up"}


def test_rules_survive_json(config):
    section = config({"multiplier": (("layers/.*", (0.25, 0.5, 1.0)), (".*", 1.0))})
    lists = json.loads(json.dumps(section.multiplier))
    assert lists == [["layers/.*", [0.25, 0.5, 1.0]], [".*", 1.0]]
    assert config({"multiplier": lists}) == section


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": (("layers/.*", 1.0),)}, "config.optim.decay: no rule matches 'embed/tokens'; end the list with"),
        ({"decay": (("lyaers/.*", 1.0), (".*", 1.0))}, "config.optim.decay: 'lyaers/.*' matches no parameter"),
        ({"decay": (("(", 1.0), (".*", 1.0))}, "config.optim.decay: '(' is no regular expression"),
        (
            {"multiplier": (("layers/.*", (1.0, 0.5)), (".*", 1.0))},
            "config.optim.multiplier: 'layers/attention/q' has 3 layers but its rule gives 2 values",
        ),
        (
            {"multiplier": ((".*", (1.0, 0.5, 0.1)),)},
            "config.optim.multiplier: 'embed/tokens' has no layers (axes ('vocab', 'embed')) but its rule gives 3",
        ),
        (
            {"decay": ((".*", -1.0),)},
            "config.optim.decay: 'embed/tokens' gets -1.0, which should be a number of at least 0",
        ),
        ({"multiplier": ((".*", float("nan")),)}, "multiplier[0][1]=nan should be a finite number"),
        ({"freeze": ((".*", 1),)}, "config.optim.freeze"),
        ({"freeze": (".*", True)}, "config.optim.freeze"),
    ],
)
def test_rules_that_do_not_fit_are_refused_in_one_line(config, changes, message):
    with pytest.raises(UsageError) as error:
        build(config(changes), specs=SPECS, total_steps=1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_rule_may_name_only_parameters_that_are_not_trained(config):
    section = config({"decay": (("embed/.*", 0.0), (".*", 1.0))})
    _, trainable = tree.split(SPECS, lambda path: path == "embed/tokens")
    with pytest.raises(UsageError, match="'embed/.\\*' matches no parameter"):
        build(section, specs=trainable, total_steps=1)
    assert "embed/tokens" not in build(section, specs=trainable, total_steps=1, frozen=["embed/tokens"]).specs
