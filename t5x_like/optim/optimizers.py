"""The optimizer of a run: one method for each leaf, learning rate, decay, multipliers and freezing around it.

State is a plain nested dict, {"count": updates made, SLOT: tree like the parameters, ...}, for example `mu` and `nu`
of AdamW. A tree of a slot holds only the leaves that have it. What a step does with a gradient before and after
(clipping, skipping) is not here.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.core import tree
from t5x_like.core.config import named
from t5x_like.core.types import ParamSpec, Tree
from t5x_like.optim.adafactor import Adafactor
from t5x_like.optim.config import MuonConfig, OptimConfig
from t5x_like.optim.dims import matrix, single
from t5x_like.optim.method import SGD, AdamW, Lion, Method
from t5x_like.optim.muon import Muon
from t5x_like.optim.rules import LeafRules, resolve
from t5x_like.optim.schedules import Schedule, build_schedule

State = dict[str, Any]


def _muon(section: MuonConfig, spec: ParamSpec) -> Method:
    if matrix(single(spec.axes)) is None:
        return AdamW(section.adam)
    return Muon(section)


# The method of a leaf by the optimizer's name, from the section of that name.
OPTIMIZERS: dict[str, Callable[[Any, ParamSpec], Method]] = {
    "adamw": lambda section, spec: AdamW(section),
    "adafactor": lambda section, spec: Adafactor(section),
    "lion": lambda section, spec: Lion(section),
    "muon": _muon,
    "sgd": lambda section, spec: SGD(section),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """Pure functions over trees of parameters; made by `build`.

    schedule: learning rate of a step
    methods: path -> method; rules: path -> what the rule lists say
    """

    schedule: Schedule
    specs: dict[str, ParamSpec]
    methods: dict[str, Method]
    rules: dict[str, LeafRules]

    def init(self, params: Tree) -> State:
        """The state before the first update; `params` may be abstract."""
        self._check(params, "parameters")
        return tree.map_with_path(lambda _, spec: jnp.zeros(spec.shape, spec.dtype), self.state_specs())

    def state_specs(self) -> State:
        """Shape, dtype and axes of every leaf of the state."""
        flat = {"count": ParamSpec((), "int32", (), "zeros")}
        for path, spec in self.specs.items():
            for slot, slot_spec in self.methods[path].slots(spec).items():
                flat[f"{slot}/{path}"] = slot_spec
        return tree.unflatten(flat)

    def state_axes(self, specs: Tree) -> State:
        """Logical axes of every leaf of the state; `specs` must be those that the optimizer was built with."""
        self._check(specs, "specs")
        return tree.map_with_path(lambda _, spec: spec.axes, self.state_specs())

    def learning_rate(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The schedule's value, before the multipliers of single leaves."""
        return self.schedule(step)

    def mask(self, grads: Tree) -> dict[str, Any]:
        """Gradients with those of frozen layers set to 0, so that they do not count in the global norm."""
        return tree.map_with_path(lambda path, grad: _zero_where(self.rules[path].frozen, grad), grads)

    def update(
        self, grads: Tree, state: State, params: Tree, step: Int[Array, ""] | int
    ) -> tuple[dict[str, Any], State]:
        """(what to add to the parameters, in fp32; the state afterwards).

        `step` drives the schedule and may run ahead of `state["count"]`, which stands still when an update is skipped.
        """
        self._check(params, "parameters")
        self._check(grads, "gradients")
        flat_grads, flat_params, flat_state = tree.flatten(grads), tree.flatten(params), tree.flatten(state)
        learning_rate, count = self.learning_rate(step), state["count"]
        updates, new_state = {}, {"count": count + 1}
        for path, spec in self.specs.items():
            rules, method = self.rules[path], self.methods[path]
            # Masters are fp32 by default; moments and updates are fp32 whatever the parameters are stored as.
            grad = _zero_where(rules.frozen, flat_grads[path].astype(jnp.float32))
            param = flat_params[path].astype(jnp.float32)
            slots = {slot: flat_state[f"{slot}/{path}"] for slot in method.slots(spec)}
            direction, slots = method.direction(spec, grad, slots, param, count)
            if jnp.ndim(rules.decay) or rules.decay:
                direction = direction + rules.decay * param
            update = -(learning_rate * rules.multiplier) * direction
            updates[path] = _zero_where(rules.frozen, update)
            new_state |= {f"{slot}/{path}": value for slot, value in slots.items()}
        return tree.unflatten(updates), tree.unflatten(new_state)

    def _check(self, given: Tree, what: str) -> None:
        shapes = {path: tuple(leaf.shape) for path, leaf in tree.leaves(given)}
        for path in sorted(shapes.keys() ^ self.specs.keys()):
            raise ValueError(f"{what} and optimizer differ: {path!r} is {'unknown' if path in shapes else 'missing'}")
        for path, spec in self.specs.items():
            if shapes[path] != spec.shape:
                raise ValueError(f"{what}: {path!r} has shape {shapes[path]}, the optimizer expects {spec.shape}")


def build(config: OptimConfig, *, specs: Tree, total_steps: int, frozen: Iterable[str] = ()) -> Optimizer:
    """The optimizer of the trainable parameters `specs`, with a schedule of `total_steps`.

    `frozen` are the paths of parameters that are not trained, which a rule may name without matching anything else.
    Raises UsageError for values out of bounds and for rules that do not fit the parameters.

    >>> from configs import common
    >>> from ml_collections import ConfigDict
    >>> from t5x_like.core import config as bridge
    >>> config = bridge.build(OptimConfig, ConfigDict(common.optim() | {"name": "muon"}), path="config.optim")
    >>> specs = {
    ...     "layers": {"up": ParamSpec((2, 4, 8), "float32", ("layers", "embed", "mlp"), "")},
    ...     "norm": ParamSpec((4,), "float32", ("norm",), ""),
    ... }
    >>> optimizer = build(config, specs=specs, total_steps=1000)
    >>> params = {"layers": {"up": jnp.ones((2, 4, 8))}, "norm": jnp.ones(4)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, 0)
    >>> tree.flatten(state).keys()
    dict_keys(['count', 'mu/layers/up', 'mu/norm', 'nu/norm'])
    >>> optimizer.state_axes(specs)["mu"]
    {'layers': {'up': ('layers', 'embed', 'mlp')}, 'norm': ('norm',)}
    """
    leaves = tree.flatten(specs)
    section = named(config)
    methods = {path: OPTIMIZERS[config.name](section, spec) for path, spec in leaves.items()}
    rules = resolve(config, specs, frozen=frozen)
    if config.name == "muon":
        for path, method in methods.items():
            if isinstance(method, AdamW):
                multiplier = rules[path].multiplier * section.adam_multiplier
                rules[path] = dataclasses.replace(rules[path], multiplier=multiplier)
    schedule = build_schedule(config.schedule, peak=config.learning_rate, total_steps=total_steps)
    return Optimizer(schedule, leaves, methods, rules)


def describe(optimizer: Optimizer) -> str:
    """A table for people: each parameter, its method, and what which rule says of it."""
    rows: list[tuple[str, ...]] = [("parameter", "method", "decay", "multiplier", "frozen", "slots")]
    for path, spec in optimizer.specs.items():
        rules, method = optimizer.rules[path], optimizer.methods[path]
        values = (rules.decay, rules.multiplier, rules.frozen)
        cells = [f"{_text(value)} by {regex}" for value, regex in zip(values, rules.patterns, strict=True)]
        slots = " ".join(f"{name}{list(slot.shape)}" for name, slot in method.slots(spec).items())
        rows.append((path, method.name, *cells, slots))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _zero_where(frozen: Any, x: jax.Array) -> jax.Array:
    """Exactly 0 where frozen, also where x is NaN."""
    if isinstance(frozen, bool):
        return jnp.zeros_like(x) if frozen else x
    return jnp.where(frozen, 0.0, x)


def _text(value: Any) -> str:
    if isinstance(value, bool | float):
        return f"{value:g}" if isinstance(value, float) else ("yes" if value else "no")
    return "[" + " ".join(_text(item) for item in value.ravel().tolist()) + "]"
