"""The table of objectives. A new one is a file beside this, a field of the config and a line here."""

import dataclasses
from collections.abc import Callable, Mapping

from t5x_like.core.config import VARIANT, named, nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.objectives import distill, dpo, grpo, lm, reward
from t5x_like.objectives.distill import DistillConfig
from t5x_like.objectives.dpo import DpoConfig
from t5x_like.objectives.grpo import GrpoConfig
from t5x_like.objectives.interface import Objective, Role
from t5x_like.objectives.lm import LmConfig
from t5x_like.objectives.reward import RewardConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One objective: the class of its config, the roles it wants, the features of the data that it can read. A config
    with a property `roles` wants those as well.

    `build(config, roles, arrays)`: `roles` by name, `arrays` is what the data offers.
    """

    config: type
    roles: tuple[str, ...]
    features: tuple[str, ...]
    build: Callable[..., Objective]


_TEXT = ("causal", "source_target", "span_corruption")
OBJECTIVES = {
    "lm": Entry(LmConfig, roles=("policy",), features=_TEXT, build=lm.build),
    "distill": Entry(DistillConfig, roles=("policy", "teacher"), features=_TEXT, build=distill.build),
    "grpo": Entry(GrpoConfig, roles=("policy",), features=("rollouts",), build=grpo.build),
    "reward": Entry(RewardConfig, roles=("policy",), features=("pair_texts",), build=reward.build),
    "dpo": Entry(DpoConfig, roles=("policy",), features=("pairs",), build=dpo.build),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: str
    lm: LmConfig | None = dataclasses.field(metadata=VARIANT)
    distill: DistillConfig | None = dataclasses.field(metadata=VARIANT)
    grpo: GrpoConfig | None = dataclasses.field(metadata=VARIANT)
    reward: RewardConfig | None = dataclasses.field(metadata=VARIANT)
    dpo: DpoConfig | None = dataclasses.field(metadata=VARIANT)

    def check(self, path: str) -> None:
        if self.name not in OBJECTIVES:
            raise UsageError(f"{path}.name={self.name!r} is unknown; {nearest(self.name, OBJECTIVES)}")


def wanted_roles(config: ObjectiveConfig) -> tuple[str, ...]:
    """The names of the models that the objective reads, the policy first."""
    return (*OBJECTIVES[config.name].roles, *getattr(named(config), "roles", ()))


def cached_roles(config: ObjectiveConfig) -> tuple[str, ...]:
    """The names of the models that are read before the first step alone: what they say lies in the token cache."""
    return getattr(named(config), "cached_roles", ())


def build(config: ObjectiveConfig, roles: Mapping[str, Role], arrays: Mapping[str, ArraySpec]) -> Objective:
    """The objective that the config names. Raises UsageError for a role or an array that it wants and does not get."""
    chosen = OBJECTIVES[config.name]
    for role in wanted_roles(config):
        if role not in roles:
            raise UsageError(
                f"config.objective.name={config.name!r} needs a model as {role!r}; "
                f"the run has {', '.join(sorted(roles))}"
            )
    return chosen.build(named(config), roles, arrays)
