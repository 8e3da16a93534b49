"""The plan's estimate of time, applied to a compiled program that was kept (compiling.py). Imports no jax.

A program with fewer layers than its row's model counts its loops over layers, and what the optimizer does, as often as
the row's layers need: layers are alike, and a loop over more of them is the same loop.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError
from t5x_like.planner.time import cost as costs
from t5x_like.planner.time import regions
from t5x_like.planner.time.cost import Cost
from t5x_like.planner.time.estimate import Estimate, estimate
from t5x_like.planner.time.network import Fabric
from t5x_like.planner.time.schedule import Block, Op
from tools.calibrate.programs import Program


@dataclasses.dataclass(frozen=True)
class Applied:
    """A kept program ready to be timed: what it does, and where its devices stand. commit: of the step that was
    compiled, "unknown" where nobody wrote it down."""

    program: Program
    cost: Cost
    fabric: Fabric
    chips: int
    commit: str = "unknown"

    def estimate(self) -> Estimate:
        return estimate(self.cost, self.fabric, chips=self.chips)


def read(program: Program, kept: Mapping[str, Any]) -> Applied:
    """Walks through a kept text; a second or less."""
    asked = accelerators.parse(program.topology)
    wraps = accelerators.wraps(asked.dims)[: asked.row.dims]
    fabric = Fabric(asked.row, kept["mesh"], np.array(kept["places"]), asked.dims, wraps)
    found = costs.cost(kept["text"], kept["mesh"])
    schedule = found.schedule
    if program.layers:
        schedule = deepened(schedule, program.model["decoder.layers"], program.layers)
    schedule = without(schedule, program.saved)
    found = dataclasses.replace(found, schedule=schedule, cycles=schedule.cycles)
    return Applied(program, found, fabric, asked.chips * program.slices, kept.get("commit") or "unknown")


def deepened(block: Block, few: int, many: int) -> Block:
    """The schedule of a model of `many` layers, from that of one of `few`. UsageError where no loop runs over these."""

    # A turn may have been taken out of a loop. The loops of one direction need not be treated as those of the other.
    def is_over_layers(loop: Block) -> bool:
        return loop.turns in (few, few - 1) and _is_of_layers(loop)

    if not any(is_over_layers(loop) for loop, _ in block.loops()):
        raise UsageError(f"the program has no loop over {few} layers; compile it with scanned layers")

    def of(item: Op | Block) -> Op | Block:
        if isinstance(item, Op):
            is_update = regions.classify(item.source)[0] == "optimizer"
            return dataclasses.replace(item, cycles=item.cycles * many // few) if is_update else item
        if item.loop and is_over_layers(item):
            turn, *asked = item.items
            assert isinstance(turn, Block) and turn.times == item.turns, item.loop
            turns = turn.times + many - few
            return dataclasses.replace(item, items=(dataclasses.replace(turn, times=turns), *asked), turns=turns)
        return dataclasses.replace(item, items=tuple(map(of, item.items)))

    return dataclasses.replace(block, items=tuple(map(of, block.items)))


def _is_of_layers(loop: Block) -> bool:
    """Whether something in it has the scope of the layers."""
    return any(_is_of_layers(item) if isinstance(item, Block) else "layers" in item.source for item in loop.items)


def without(block: Block, saved: tuple[str, ...]) -> Block:
    """The schedule without computing again what lies in the regions `saved`, kernels apart."""

    def is_left(item: Op | Block) -> bool:
        if isinstance(item, Block) or item.kernel or item.begins or item.ends:
            return True
        region, which = regions.classify(item.source)
        return which != "recomputed" or region not in saved

    items = (without(item, saved) if isinstance(item, Block) else item for item in block.items if is_left(item))
    return dataclasses.replace(block, items=tuple(items)) if saved else block
