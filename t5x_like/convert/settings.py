"""Fields of a Hugging Face `config.json`, read strictly and written so that transformers 4 and 5 read them alike."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.layers.positions import RopeScaling
from t5x_like.models.config import ModelConfig
from t5x_like.models.families import FAMILIES

# Their names of activations and ours.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# The scalings of rotary positions: our fields and theirs, in the order of our classes.
_SCALINGS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency": "low_freq_factor",
        "high_frequency": "high_freq_factor",
        "original_length": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # where a file does not say


class Settings:
    """The fields of a config.json; `where` is its path in messages, `tensors` the names beside it."""

    def __init__(self, fields: Mapping[str, Any], where: str, tensors: Collection[str]):
        self._fields, self.where, self.tensors = fields, where, tensors

    def get(self, name: str, default: Any) -> Any:
        """A field, or what transformers assumes where the file does not give it or gives null."""
        value = self._fields.get(name)
        value = default if value is None else value
        kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{self.where}: {name}={value!r} should be of the type {type(default).__name__}")
        return float(value) if isinstance(default, float) else value

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number from 1; `default` None: it must be given."""
        value = self._fields.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            found = "is missing" if value is None else f"is {value!r}"
            raise UserError(f"{self.where}: {name} {found}; expected a whole number from 1")
        return value

    def activation(self, name: str, default: str) -> str:
        return self.activation_of(name, self.get(name, default))

    def activation_of(self, name: str, value: str) -> str:
        """Our name of an activation that the field `name` gives."""
        if value not in _ACTIVATIONS:
            raise UserError(f"{self.where}: {name}={value!r} is unknown; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def require(self, **expected: Any) -> None:
        """Raises UserError for a field that is given and is not what our model computes."""
        for name, value in expected.items():
            found = self._fields.get(name)
            if found is not None and found != value:
                raise UserError(f"{self.where}: {name}={found!r} is not supported; expected {value!r}")

    def rope(self) -> dict[str, Any]:
        """Our section `rope`: from `rope_parameters` (transformers 5), else `rope_theta` and `rope_scaling` (4)."""
        new = self._fields.get("rope_parameters")
        given: Any = new if new is not None else self._fields.get("rope_scaling")
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise UserError(f"{self.where}: rope_parameters={given!r} should be a mapping")
        theta = given.get("rope_theta", self._fields.get("rope_theta", 10_000.0))
        kind = given.get("rope_type", given.get("type", "default"))
        if not isinstance(theta, int | float) or kind not in ("default", *_SCALINGS):
            raise UserError(
                f"{self.where}: rope_type={kind!r} with rope_theta={theta!r} is unknown; known: default, "
                f"{', '.join(_SCALINGS)}"
            )
        self.require(partial_rotary_factor=1.0)
        scaling = {"name": "none"} if kind == "default" else {"name": kind, kind: self._scaling(kind, given)}
        return {"theta": (float(theta),), "scaling": scaling}

    def _scaling(self, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The variant `kind` of our section `rope.scaling`."""
        said = {name: value for name, value in given.items() if value is not None}
        if kind == "yarn":
            said = _YARN | said
            for name, usual in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
                if said.get(name, usual) != usual:
                    raise UserError(f"{self.where}: {name}={said[name]!r} of rope_parameters is not supported")
            if isinstance(said.get("factor"), int | float):
                said = {"attention_factor": 0.1 * math.log(max(said["factor"], 1.0)) + 1.0} | said
        missing = [name for name in _SCALINGS[kind].values() if not isinstance(said.get(name), int | float)]
        if missing:
            raise UserError(f"{self.where}: rope_parameters of the type {kind} lack the number {missing[0]!r}")
        numbers: dict[str, Any] = {ours: float(said[theirs]) for ours, theirs in _SCALINGS[kind].items()}
        if "original_length" in numbers:
            numbers["original_length"] = int(numbers["original_length"])
        return numbers


def rope_settings(thetas: Sequence[float], scaling: RopeScaling) -> dict[str, Any]:
    """The fields that say it to both: transformers 4 takes its defaults where it finds `rope_parameters` alone."""
    if len(set(thetas)) != 1:
        raise UserError(f"rope.theta={thetas} has no place in a Hugging Face model of this family; expected one number")
    theta = thetas[0]
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling.chosen is not None:
        names = _SCALINGS[scaling.name]
        kind = {"rope_type": scaling.name} | {theirs: getattr(scaling.chosen, ours) for ours, theirs in names.items()}
    old = None if scaling.name == "none" else kind
    return {"rope_theta": theta, "rope_scaling": old, "rope_parameters": {"rope_theta": theta, **kind}}


def activation_name(ours: str) -> str:
    """Their name of an activation; of several the one that both versions of transformers know."""
    return next(theirs for theirs, name in _ACTIVATIONS.items() if name == ours)


def require_usual(config: ModelConfig, *, free: Collection[str]) -> None:
    """Raises UserError for the first field that is not as in our family of that name and that its files cannot say.

    free: paths of fields, or of sections, that they can say.
    """
    usual = _flat(FAMILIES[config.family][0], "")
    found = _flat(dataclasses.asdict(config), "")
    for path, value in usual.items():
        said = any(f"{path}.".startswith(f"{name}.") for name in free)
        if path in found and found[path] != value and not said:
            raise UserError(
                f"config.model.{path}={found[path]!r} has no place in a Hugging Face model of the family "
                f"{config.family}; expected {value!r}"
            )


def _flat(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return found
