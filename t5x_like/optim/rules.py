"""Which parameters decay, learn faster or slower, or stay frozen: rule lists by path, resolved to factors of leaves.

What a rule list is stands in config.py, how one matches in core/tree.py. A value per layer becomes an array that
broadcasts along the leaf's `layers` dim; nothing here knows about gradients.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ParamSpec, Tree
from t5x_like.optim.config import OptimConfig

PATH = "config.optim"

Factor = float | np.ndarray  # an array has the leaf's number of dims, all of size 1 but `layers`


@dataclasses.dataclass(frozen=True, eq=False)
class LeafRules:
    """What the rule lists say of one leaf, and the regexes that matched.

    decay: coefficient of the decoupled weight decay (config.optim.weight_decay times its factor)
    multiplier: factor of the learning rate
    frozen: True or False for the whole leaf, or an array of booleans per layer
    patterns: the regexes that matched in the lists decay, multiplier and freeze
    """

    decay: Factor
    multiplier: Factor
    frozen: bool | np.ndarray
    patterns: tuple[str, str, str]


def resolve(config: OptimConfig, specs: Tree, *, frozen: Iterable[str] = ()) -> dict[str, LeafRules]:
    """The rules of every path of `specs`.

    `frozen` are paths of parameters that are not in `specs`: a rule may match them alone. Raises UsageError for an
    uncovered path, a rule that matches nothing, and a value per layer that does not fit its leaf.
    """
    leaves = tree.flatten(specs)
    others = list(frozen)
    decay = _match(config.decay, leaves, others, "decay", numeric=True)
    multiplier = _match(config.multiplier, leaves, others, "multiplier", numeric=True)
    switches = _match(config.freeze, leaves, others, "freeze", numeric=False)
    return {
        path: LeafRules(
            decay=config.weight_decay * decay[path][1],
            multiplier=multiplier[path][1],
            frozen=switches[path][1],
            patterns=(decay[path][0], multiplier[path][0], switches[path][0]),
        )
        for path in leaves
    }


def frozen_paths(config: OptimConfig, specs: Tree) -> set[str]:
    """Paths of leaves that `config.freeze` freezes wholly; `specs` are those of the whole model.

    Leaves frozen in some layers only are not among them: the optimizer leaves those layers exactly unchanged.
    """
    switches = _match(config.freeze, tree.flatten(specs), [], "freeze", numeric=False)
    return {path for path, (_, value) in switches.items() if bool(np.all(value))}


def _match(
    rules: Sequence[Sequence[Any]], leaves: Mapping[str, ParamSpec], others: list[str], field: str, *, numeric: bool
) -> dict[str, tuple[str, Any]]:
    """(regex, value ready for the leaf) of every path of `leaves`."""
    where = f"{PATH}.{field}"
    pairs = []
    for rule in rules:
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise UsageError(f"{where}: {rule!r} should be a pair (regex, value)")
        pairs.append((rule[0], (rule[0], rule[1])))
    matched = tree.match_rules(pairs, [*leaves, *others], where=where)
    return {
        path: (matched[path][0], _for_leaf(matched[path][1], spec, where=f"{where}: {path!r}", numeric=numeric))
        for path, spec in leaves.items()
    }


def _for_leaf(value: Any, spec: ParamSpec, *, where: str, numeric: bool) -> Any:
    """One value as it is; one per layer as an array that broadcasts along `layers`."""
    if not isinstance(value, list | tuple):
        return _one(value, where, numeric)
    if "layers" not in spec.axes:
        raise UsageError(f"{where} has no layers (axes {spec.axes}) but its rule gives {len(value)} values; give one")
    dim = spec.axes.index("layers")
    if len(value) != spec.shape[dim]:
        raise UsageError(f"{where} has {spec.shape[dim]} layers but its rule gives {len(value)} values")
    values = np.array([_one(item, where, numeric) for item in value], np.float32 if numeric else np.bool_)
    return values.reshape([-1 if index == dim else 1 for index in range(len(spec.shape))])


def _one(value: Any, where: str, numeric: bool) -> float | bool:
    if numeric and isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    if not numeric and isinstance(value, bool):
        return value
    expected = "a number of at least 0" if numeric else "True or False"
    raise UsageError(f"{where} gets {value!r}, which should be {expected} or a tuple of them, one per layer")
