"""The table of objectives. A new one is a file beside this and a line here."""

import dataclasses

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.models.model import Model
from t5x_like.objectives import lm
from t5x_like.objectives.interface import Objective

OBJECTIVES = {"lm": lm.build}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: str
    lm: lm.LmConfig


def build(config: ObjectiveConfig, model: Model) -> Objective:
    if config.name not in OBJECTIVES:
        raise UsageError(f"config.objective.name={config.name!r} is unknown; {nearest(config.name, OBJECTIVES)}")
    return OBJECTIVES[config.name](getattr(config, config.name), model)
