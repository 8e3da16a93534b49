"""What a train step needs of a device's memory, by part, before anything is compiled: from shapes and shardings alone.

State, gradients and what is saved for the backward pass are read off the program as it is traced, so that they follow
every model, remat policy and optimizer; layouts of the compiler (padding) are not in them. `working` is an estimate.
Not here: how it is found (runs/footprint.py). Standard library only.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on one device.

    parameters: trained ones; frozen: those that are read only, of all models; average: the running average of
        parameters
    gradients: as their parameters lie; with several micro-batches their sum and those of one
    saved: activations of a micro-batch that the backward pass finds, by the remat policy
    working: what the backward pass of one layer, or the loss, holds besides at its worst moment (an estimate)
    """

    parameters: int
    frozen: int
    optimizer: int
    average: int
    gradients: int
    saved: int
    working: int

    @property
    def state(self) -> int:
        """What stays between two steps."""
        return self.parameters + self.frozen + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.saved + self.working

    def to_json(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "state": self.state, "total": self.total}
