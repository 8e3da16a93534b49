"""Walks a compiled program and adds up what the compiler says of it: cycles, kernels and collectives of one step.

Every fusion carries `estimated_cycles`, the compiler's own cost model; a loop's body counts as often as the loop
runs and a conditional as its dearest branch. Not here: seconds. Cycles say nothing of collectives, which overlap
with them or not, and nothing of Pallas kernels, which are listed apart.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from t5x_like.planner import hlo
from t5x_like.planner.collectives import Collective, kind_of, read, transfers

_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
# The compiler writes the largest number there is where it has no estimate (gathers that the sparse core does).
_NO_ESTIMATE = 2**62
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_THREAD = re.compile(r'async_execution_thread="([^"]*)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_KERNEL = "tpu_custom_call"  # what Pallas lowers to


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel that runs `count` times a step. The compiler estimates no cycles for it."""

    name: str
    count: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that data may end before its limit (decoding, when all rows have ended): counted as if it ran `turns`
    times, which take `cycles` together."""

    name: str
    turns: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """One step, per device. `cycles` are the compiler's estimate for the TensorCore, kernels not included.

    `without_estimate`: {name: executions} of work that the compiler gave no estimate for (sorts, scatters), and
    `unknown_loops`: loops whose length depends on data alone, counted once. Where these are long, `cycles` is too low.
    `limited_loops` are counted at their limit, so there it may be too high.
    """

    cycles: int
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    without_estimate: dict[str, int]
    unknown_loops: tuple[str, ...]
    limited_loops: tuple[Loop, ...]


def cost(text: str, mesh_shape: Mapping[str, int]) -> Cost:
    """The cost of the program in `text` (`compiled.as_text()`), jitted over a mesh of {axis: size}."""
    module = hlo.parse(text)
    entry = module.computations[module.entry]
    tally = _Walk(module, mesh_shape).computation(entry, arguments=[], times=1)
    return Cost(
        cycles=tally.cycles,
        kernels=tuple(Kernel(name, count) for name, count in tally.kernels.items()),
        collectives=tuple(tally.collectives),
        without_estimate=dict(tally.without_estimate),
        unknown_loops=tuple(tally.unknown_loops),
        limited_loops=tuple(tally.limited_loops),
    )


@dataclasses.dataclass
class _Tally:
    """A sum under construction."""

    cycles: int = 0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    without_estimate: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    limited_loops: list[Loop] = dataclasses.field(default_factory=list)

    def add(self, other: "_Tally") -> None:
        self.cycles += other.cycles
        self.kernels += other.kernels
        self.collectives += other.collectives
        self.without_estimate += other.without_estimate
        self.unknown_loops += other.unknown_loops
        self.limited_loops += other.limited_loops

    def dearness(self) -> tuple[int, int]:
        return self.cycles, sum(item.count * item.bytes_each for item in self.collectives)


# Work worth naming when it has no estimate; the rest (get-tuple-element, bitcast, ...) is free.
_WORK = ("fusion", "convolution", "dot", "scatter", "gather", "sort", "reduce", "copy")


class _Walk:
    """Adds up computations of one module."""

    def __init__(self, module: hlo.Module, mesh_shape: Mapping[str, int]) -> None:
        self.module = module
        self.mesh_shape = mesh_shape

    def computation(self, computation: hlo.Computation, *, arguments: Sequence, times: int) -> _Tally:
        """The tally of `times` executions; `arguments` are the scalars known of its parameters."""
        tally = _Tally()
        tally.collectives += [item.collective for item in transfers(computation, self.mesh_shape, count=times)]
        chains: set[tuple[str, str]] = set()
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                tally.add(self.loop(computation, instruction, arguments, times))
            elif instruction.opcode == "conditional":
                branches = [self.module.computations[name] for name in instruction.branches()]
                tallies = [self.computation(branch, arguments=[], times=times) for branch in branches]
                tally.add(max(tallies, key=_Tally.dearness))
            elif instruction.opcode in ("call", "call-start", "async-start"):
                for name in instruction.called("calls", "to_apply"):
                    called = self.computation(self.module.computations[name], arguments=[], times=times)
                    if _THREAD.search(instruction.attributes):
                        called.cycles = 0  # another core's
                    tally.add(called)
            else:
                self.instruction(tally, computation, instruction, chains, times)
        return tally

    def loop(self, computation: hlo.Computation, loop: hlo.Instruction, arguments: Sequence, times: int) -> _Tally:
        trips = hlo.trips(self.module, computation, loop, arguments)
        turns = times * (1 if trips is None else trips.count)
        body, condition = (self.module.computations[loop.called(part)[0]] for part in ("body", "condition"))
        known = hlo.loop_arguments(self.module, computation, loop, arguments)
        tally = self.computation(body, arguments=known, times=turns)
        # It may hold work: whether all rows have ended is asked of all devices.
        tally.add(self.computation(condition, arguments=known, times=turns + times))
        if trips is None:
            tally.unknown_loops.append(loop.name)
        elif not trips.exact:
            tally.limited_loops.append(Loop(loop.name, turns, tally.cycles))
        return tally

    def instruction(
        self,
        tally: _Tally,
        computation: hlo.Computation,
        instruction: hlo.Instruction,
        chains: set[tuple[str, str]],
        times: int,
    ) -> None:
        """Adds one instruction that calls nothing or is a fusion."""
        if kind_of(instruction.opcode):
            tally.collectives.append(self.collective(computation, instruction, times))
            return
        target = _TARGET.search(instruction.attributes) if instruction.opcode == "custom-call" else None
        if target:
            if target.group(1) == _KERNEL:
                tally.kernels[_plain(instruction.name)] += times
            return
        communicates = instruction.opcode == "fusion" and self.fused_collectives(tally, instruction, chains, times)
        estimate = _CYCLES.search(instruction.attributes)
        if estimate and int(estimate.group(1)) < _NO_ESTIMATE:
            tally.cycles += times * int(estimate.group(1))
        elif instruction.opcode in _WORK and not communicates and _is_array(instruction.shape):
            tally.without_estimate[_plain(instruction.name)] += times

    def fused_collectives(
        self, tally: _Tally, fusion: hlo.Instruction, chains: set[tuple[str, str]], times: int
    ) -> bool:
        """Adds the collectives inside a fusion; whether there are any.

        A collective that runs beside other work is written into each fusion that advances it: added once a chain.
        """
        called = self.module.computations[fusion.called("calls")[0]]
        any_found = False
        for inner in called.instructions.values():
            if inner.opcode == "fusion":
                any_found |= self.fused_collectives(tally, inner, chains, times)
            if not kind_of(inner.opcode):
                continue
            any_found = True
            chain, channel = _CHAIN.search(inner.attributes), _CHANNEL.search(inner.attributes)
            if chain:
                key = (chain.group(1), channel.group(1) if channel else "")
                if key in chains:
                    continue
                chains.add(key)
            found = self.collective(called, inner, times)
            if found.kind == "all-reduce" and _keeps_a_shard(called, inner):
                found = dataclasses.replace(found, kind="reduce-scatter")
            tally.collectives.append(found)
        return any_found

    def collective(self, computation: hlo.Computation, instruction: hlo.Instruction, times: int) -> Collective:
        shapes = [computation.instructions[name].shape for name in instruction.operands]
        return read(instruction, shapes, self.mesh_shape, count=times)


def _plain(name: str) -> str:
    """The name without the numbers that tell equal instructions apart."""
    return re.sub(r"([._]\d+|\.clone)+$", "", name)


def _is_array(shape: str) -> bool:
    return not re.match(r"\w+\[\]", shape)


def _keeps_a_shard(computation: hlo.Computation, reduction: hlo.Instruction) -> bool:
    """Whether a fused all-reduce gives each device its slice alone, which is how a TPU runs reduce-scatter."""
    users = [item for item in computation.instructions.values() if reduction.name in item.operands]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in ("bitcast", "copy") and _keeps_a_shard(computation, user))
        for user in users
    )
