"""The table of objectives. A new one is a file beside this and a line here."""

import dataclasses

from t5x_like.core.config import VARIANT, nearest
from t5x_like.core.errors import UsageError
from t5x_like.models.model import Model
from t5x_like.objectives import lm
from t5x_like.objectives.interface import Objective
from t5x_like.objectives.lm import LmConfig

OBJECTIVES = {"lm": lm.build}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: str
    lm: LmConfig | None = dataclasses.field(metadata=VARIANT)

    def check(self, path: str) -> None:
        if self.name not in OBJECTIVES:
            raise UsageError(f"{path}.name={self.name!r} is unknown; {nearest(self.name, OBJECTIVES)}")


def build(config: ObjectiveConfig, model: Model) -> Objective:
    return OBJECTIVES[config.name](getattr(config, config.name), model)
