"""How wide the first values of each weight are drawn: from its role and its number of inputs to an initializer's name.

Not here: drawing them (param.py).
"""

import dataclasses
import math

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.layers.param import normal

INITIALIZATIONS = ("normal", "fan_in")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The standard deviations of first weights.

    name "normal": `std` everywhere (GPT-2, Llama). "fan_in": `std` divided by the root of a weight's number of inputs,
    that of queries also by the root of the head size, embeddings as they are (T5, arXiv 1910.10683, as its published
    code does). depth_scaled: divides by sqrt(2 layers) where a branch ends (GPT-2).
    """

    name: str
    std: float
    depth_scaled: bool

    def check(self, path: str) -> None:
        if self.name not in INITIALIZATIONS:
            raise UsageError(f"{path}.name={self.name!r} is unknown; {nearest(self.name, INITIALIZATIONS)}")
        if not self.std > 0:
            raise UsageError(f"{path}.std={self.std:g} should be above 0")


@dataclasses.dataclass(frozen=True)
class Initialization:
    """Initializers for the weights of one stack of `layers` layers."""

    config: InitConfig
    layers: int

    def weight(self, inputs: int) -> str:
        """A matrix that sums over `inputs` numbers."""
        return normal(self._std(inputs))

    def query(self, inputs: int, head_size: int) -> str:
        """Queries: with "fan_in" they are made small here, since logits are not scaled."""
        return normal(self._std(inputs * head_size))

    def branch_end(self, inputs: int) -> str:
        """The last matrix of a branch, whose output is added to what passes from layer to layer."""
        depth = math.sqrt(2 * self.layers) if self.config.depth_scaled else 1.0
        return normal(self._std(inputs) / depth)

    def embedding(self) -> str:
        """Tables of tokens and positions."""
        return normal(self.config.std)

    def _std(self, inputs: int) -> float:
        return self.config.std / (math.sqrt(inputs) if self.config.name == "fan_in" else 1.0)
