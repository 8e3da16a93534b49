"""Where an adapter sits on a model: the specs of its parameters, and the one function that puts it onto the weights.

Adapters have a root of their own beside the model's paths, so that no path of a model moves:

    {"layers": {"attention": {"q": W}}, "adapters": {"layers": {"attention": {"q": {"a": A, "b": B}}}}}

`Adapter.attach` takes that root out of a tree and wraps the weights. It stands where a run's parameters become those
of a model (objectives.interface.Role.whole): trees of states and files hold plain arrays.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_like.core import config as bridge
from t5x_like.core import tree
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ParamSpec, Tree
from t5x_like.layers.param import ZEROS, normal
from t5x_like.optim.dims import BATCH_AXES, matrix, single
from t5x_like.peft.config import AdapterConfig, LoraConfig, Rank
from t5x_like.peft.lora import LoraArray

ROOT = "adapters"


# Tables of the vocabulary [V, D], which no pattern that matches a matrix of layers is taken to mean.
EMBEDDING, HEAD = "embed/tokens", "head/weight"


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight that is adapted. ranks: of each layer, or one. scales: s of each, 0 where the rank is 0. drawn: which
    of A and B does not begin as zeros, and how."""

    spec: ParamSpec
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    drawn: tuple[str, str]

    @property
    def rank(self) -> int:
        return max(self.ranks)

    @property
    def stacked_dims(self) -> int:
        """How many dims of the weight, the first ones, stack matrices."""
        return len(_batch(self.spec))

    def specs(self) -> dict[str, ParamSpec]:
        """A and B, one of which is drawn and the other zeros (`_drawn`).

        All layers have the columns of the largest rank; those that a layer has too many are multiplied with 0, and so
        get no gradient.
        """
        s = self.spec
        outer = _batch(s)
        inputs, outputs = (tuple(len(outer) + dim for dim in side) for side in _sides(s))
        before = tuple(range(len(outer)))
        a, b = before + inputs, outputs
        name, init = self.drawn
        return {
            "a": ParamSpec(
                (*(s.shape[dim] for dim in a), self.rank),
                "float32",
                (*(s.axes[dim] for dim in a), "rank"),
                init if name == "a" else ZEROS,
            ),
            "b": ParamSpec(
                (*(s.shape[dim] for dim in before), self.rank, *(s.shape[dim] for dim in b)),
                "float32",
                (*(s.axes[dim] for dim in before), "rank", *(s.axes[dim] for dim in b)),
                init if name == "b" else ZEROS,
            ),
        }

    def scale_R(self) -> np.ndarray:
        """[layers, rank], or [rank] of a weight without layers."""
        columns = np.arange(self.rank)
        table = [np.where(columns < rank, scale, 0.0) for rank, scale in zip(self.ranks, self.scales, strict=True)]
        return np.asarray(table if self.spec.axes[:1] == ("layers",) else table[0], np.float32)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of a config on a model, by path of the weight."""

    targets: Mapping[str, Target]
    dropout: float

    def specs(self) -> dict[str, Any]:
        """Of the parameters that are trained, below ROOT."""
        return {ROOT: tree.unflatten({path: target.specs() for path, target in self.targets.items()})}

    def attach(self, whole: Tree) -> dict[str, Any]:
        """The tree that a model takes, of one with ROOT beside the model's own paths."""
        parts = tree.flatten(whole[ROOT])
        model = tree.flatten({name: part for name, part in whole.items() if name != ROOT})
        for path, target in self.targets.items():
            model[path] = LoraArray(
                base=model[path],
                a=parts[f"{path}/a"],
                b=parts[f"{path}/b"],
                scale_R=jnp.asarray(target.scale_R()),
                key=None,
                axes=target.spec.axes,
                dropout=self.dropout,
            )
        return tree.unflatten(model)


def is_adapter(path: str) -> bool:
    """Whether a path of a run's parameters is one of an adapter's."""
    return path.startswith(f"{ROOT}/")


def build(config: AdapterConfig, specs: Tree) -> Adapter | None:
    """The adapter of a config on a model of these specs, None for none.

    Raises UsageError for a target or a rank that matches nothing, and a rank that does not fit a weight.
    """
    if config.lora is None:
        return None
    lora, where = config.lora, "config.adapter.lora"
    known = {path: spec for path, spec in tree.leaves(specs) if _is_matrix(spec) or path in (EMBEDDING, HEAD)}
    _check_patterns(f"{where}.targets", lora.targets, known)
    paths = {path for pattern in lora.targets for path in _matched(pattern, known)}
    chosen = {path: spec for path, spec in known.items() if path in paths}
    _check_patterns(f"{where}.ranks", [pattern for pattern, _ in lora.ranks], chosen)
    return Adapter({path: _target(lora, path, spec, where) for path, spec in chosen.items()}, lora.dropout)


def of_stored(config: Mapping[str, Any], specs: Tree) -> Adapter | None:
    """The adapter that a stored config names; one of a model that was converted has no such section."""
    if not has_adapter(config):
        return None
    return build(bridge.build(AdapterConfig, config["adapter"], path="config.adapter"), specs)


def has_adapter(config: Mapping[str, Any]) -> bool:
    """Whether a stored config is that of a run that trained an adapter."""
    return (config.get("adapter") or {}).get("name", "none") != "none"


def _target(config: LoraConfig, path: str, spec: ParamSpec, where: str) -> Target:
    given: Rank = config.rank
    field = "rank"
    for pattern, rank in config.ranks:
        if re.fullmatch(pattern, path):
            given, field = rank, "ranks"
            break
    layers = spec.shape[0] if spec.axes[:1] == ("layers",) else 1
    ranks = (given,) * layers if isinstance(given, int) else given
    if len(ranks) != layers or max(ranks) == 0:
        raise UsageError(f"{where}.{field}: {path!r} has {layers} layers, and gets {ranks}; give one rank above 0")
    outer = len(_batch(spec))
    sides = [math.prod(spec.shape[outer + dim] for dim in side) for side in _sides(spec)]
    if max(ranks) > min(sides):
        raise UsageError(
            f"{where}.{field}={given!r} is more than {path!r} has, a matrix of {sides[0]} x {sides[1]}; use at most "
            f"{min(sides)}"
        )
    root = 0.5 if config.rank_stabilized else 1.0
    scales = tuple(config.alpha / rank**root if rank else 0.0 for rank in ranks)
    return Target(spec, ranks, scales, _drawn(path, spec))


def _matched(pattern: str, known: Mapping[str, ParamSpec]) -> list[str]:
    """The paths that a pattern means: of matrices of layers, as ".*"; where it matches none, of the ends."""
    found = [path for path in known if re.fullmatch(pattern, path)]
    return [path for path in found if path not in (EMBEDDING, HEAD)] or found


def _drawn(path: str, spec: ParamSpec) -> tuple[str, str]:
    """Which factor is drawn, as in peft: A by the number of its inputs, or of a lookup B, with deviation 1. The table
    of an LM head is [V, D], so that what reads the hidden states stands second."""
    if path == EMBEDDING:
        return "b", normal(1.0)
    side = _sides(spec)[1 if path == HEAD else 0]
    width = math.prod(spec.shape[len(_batch(spec)) + dim] for dim in side)
    return "b" if path == HEAD else "a", f"uniform({width**-0.5:.9g})"


def _check_patterns(where: str, patterns: Any, paths: Mapping[str, Any]) -> None:
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UsageError(
                f"{where}: {pattern!r} matches no matrix of the layers, nor an end; {nearest(pattern, paths)}"
            )


def _is_matrix(spec: ParamSpec) -> bool:
    return "layers" in spec.axes and matrix(single(spec.axes)) is not None


def _batch(spec: ParamSpec) -> tuple[str | None, ...]:
    return tuple(axis for axis in spec.axes if axis in BATCH_AXES)


def _sides(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input dims, output dims) of one of the stacked matrices, whose batch dims come first; of a table, its two."""
    axes = single(spec.axes)
    found = ((0,), (1,)) if axes == ("vocab", "embed") else matrix(axes)
    assert found is not None, spec
    return found
