"""Walks a compiled program and adds up what the compiler says of it: cycles, kernels and collectives of one step.

Every fusion carries `estimated_cycles`, the compiler's own cost model; a loop's body counts as often as the loop
runs and a conditional as its dearest branch. Not here: seconds. Cycles say nothing of collectives, which overlap
with them or not, and nothing of Pallas kernels, which are listed apart.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.planner import hlo
from t5x_like.planner.time import products
from t5x_like.planner.time.collectives import Collective, Transfer, kind_of, read, transfers
from t5x_like.planner.time.schedule import Begun, Block, Copy, KernelCall, Op
from t5x_like.planner.time.sources import Sources

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_THREAD = re.compile(r'async_execution_thread="([^"]*)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_KERNEL = "tpu_custom_call"  # what Pallas lowers to
_SETTINGS = re.compile(r'"xprof_metadata":"((?:[^"\\]|\\.)*)"')


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
    `limited_loops` are counted at their limit, so there it may be too high. `schedule` is what all this is the sum of.
    """

    cycles: int
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    without_estimate: dict[str, int]
    unknown_loops: tuple[str, ...]
    limited_loops: tuple[Loop, ...]
    schedule: Block = Block(1, ())


def cost(text: str, mesh_shape: Mapping[str, int]) -> Cost:
    """The cost of the program in `text` (`compiled.as_text()`), jitted over a mesh of {axis: size}."""
    module = hlo.parse(text)
    schedule = _Walk(module, mesh_shape).block(module.computations[module.entry], arguments=[])
    kernels, without_estimate = collections.Counter(), collections.Counter()
    for op, times in schedule.each():
        if op.kernel:
            kernels[op.kernel.name] += times
        if op.lacks_estimate:
            without_estimate[_plain(op.name)] += times
    loops = list(schedule.loops())
    return Cost(
        cycles=schedule.cycles,
        kernels=tuple(Kernel(name, count) for name, count in kernels.items()),
        collectives=tuple(schedule.collectives()),
        without_estimate=dict(without_estimate),
        unknown_loops=tuple(loop.loop for loop, _ in loops if loop.turns is None),
        limited_loops=tuple(
            Loop(loop.loop, loop.turns * times, loop.cycles * times)
            for loop, times in loops
            if loop.turns is not None and not loop.surely
        ),
        schedule=schedule,
    )


# Work worth naming when it has no estimate; the rest (get-tuple-element, bitcast, ...) is free.
_WORK = ("fusion", "convolution", "dot", "scatter", "gather", "sort", "reduce", "copy")
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "replica-id")


class _Walk:
    """Reads computations of one module."""

    def __init__(self, module: hlo.Module, mesh_shape: Mapping[str, int]) -> None:
        self.module = module
        self.mesh_shape = mesh_shape
        self.sources = Sources(module)

    def block(self, computation: hlo.Computation, *, arguments: Sequence) -> Block:
        """What one execution does; `arguments` are the scalars known of its parameters."""
        items: list[Op | Block] = []
        advanced: dict[str, int] = {}  # the last item that advances a chain
        exchanges = transfers(computation, self.mesh_shape, count=1)
        paired = {name for exchange in exchanges for name in (exchange.send, exchange.recv)}
        for place, instruction in enumerate(computation.instructions.values()):
            items += [_exchanged(e, at_start=place == e.start) for e in exchanges if place in (e.start, e.done)]
            if instruction.opcode in ("send", "recv", "send-done", "recv-done"):
                if instruction.opcode in ("send", "recv") and instruction.name not in paired:
                    # To the host, or to another slice without what comes back: no time is known.
                    source = self.sources.of(computation, instruction)
                    items.append(Op(instruction.opcode, source, lacks_estimate=True))
                continue
            if instruction.opcode == "while":
                items.append(self.loop(computation, instruction, arguments))
            elif instruction.opcode == "conditional":
                branches = [self.module.computations[name] for name in instruction.branches()]
                items.append(max((self.block(branch, arguments=[]) for branch in branches), key=_dearness))
            elif instruction.opcode == "call":
                items += [self.called(name) for name in instruction.called("calls", "to_apply")]
            elif instruction.opcode in ("call-start", "async-start"):
                items += self.elsewhere(computation, instruction)
            else:
                op = self.op(computation, instruction, advanced, number=len(items))
                items += [op] if op else []
        for key, number in advanced.items():
            last = items[number]
            assert isinstance(last, Op), last
            items[number] = dataclasses.replace(last, ends=(*last.ends, key))
        return Block(1, tuple(items))

    def called(self, name: str) -> Block:
        return self.block(self.module.computations[name], arguments=[])

    def loop(self, computation: hlo.Computation, loop: hlo.Instruction, arguments: Sequence) -> Block:
        trips = hlo.trips(self.module, computation, loop, arguments)
        turns = 1 if trips is None else trips.count
        body, condition = (self.module.computations[loop.called(part)[0]] for part in ("body", "condition"))
        known = hlo.loop_arguments(self.module, computation, loop, arguments)
        turn = dataclasses.replace(self.block(body, arguments=known), times=turns)
        # It may hold work: whether all rows have ended is asked of all devices.
        asked = dataclasses.replace(self.block(condition, arguments=known), times=turns + 1)
        exact = trips is not None and trips.exact
        return Block(1, (turn, asked), loop.name, None if trips is None else turns, surely=exact)

    def elsewhere(self, computation: hlo.Computation, start: hlo.Instruction) -> list[Op | Block]:
        """A computation that runs beside what follows: its collectives are in flight from here on, and what it computes
        comes first, unless another core does: that costs this one nothing."""
        blocks = [self.called(name) for name in start.called("calls", "to_apply")]
        begins = [Begun(start.name, collective) for block in blocks for collective in block.collectives()]
        here = [] if _THREAD.search(start.attributes) else [_computing(block) for block in blocks]
        op = Op(start.name, self.sources.of(computation, start), begins=tuple(begins))
        return [op, *(block for block in here if block.items)]

    def op(
        self, computation: hlo.Computation, instruction: hlo.Instruction, advanced: dict[str, int], *, number: int
    ) -> Op | None:
        """One instruction that calls nothing or is a fusion, item `number` of its block; None where it is free."""
        name, opcode = instruction.name, instruction.opcode
        if opcode in _FREE:
            return None
        source = self.sources.of(computation, instruction)
        if opcode == "copy-start":
            return Op(name, source, begins=(Begun(name, _copy(instruction)),))
        if kind_of(opcode):
            transfer = Begun(name, self.collective(computation, instruction))
            return Op(name, source, begins=(transfer,), ends=() if opcode.endswith("-start") else (name,))
        if opcode.endswith("-done"):
            return Op(name, source, ends=(_begun_by(computation, instruction),))
        target = _TARGET.search(instruction.attributes) if opcode == "custom-call" else None
        if target:
            shapes = tuple(computation.instructions[operand].shape for operand in instruction.operands)
            kernel = KernelCall(_plain(name), shapes, _settings(instruction))
            return Op(name, source, kernel=kernel) if target.group(1) == _KERNEL else None
        fused = self.fused_collectives(instruction) if opcode == "fusion" else []
        begins, ends = [], []
        for chain, collective in fused:
            key = chain or f"{name} {len(begins)}"
            if not chain:
                ends.append(key)
            if not chain or chain not in advanced:
                begins.append(Begun(key, collective))
            if chain:
                advanced[chain] = number
        known = instruction.cycles is not None
        lacks = not known and opcode in _WORK and not fused and _is_array(instruction.shape)
        if not (known or lacks or fused):
            return None
        done = products.flops(self.module, instruction, computation)
        eight_bits = {kind: count for kind, count in done.items() if kind}
        op = Op(name, source, instruction.cycles or 0, done.total(), eight_bits, lacks)
        return dataclasses.replace(op, begins=tuple(begins), ends=tuple(ends))

    def fused_collectives(self, fusion: hlo.Instruction) -> list[tuple[str, Collective]]:
        """(chain, collective) of each collective inside a fusion.

        A collective that runs beside other work is written into each fusion that advances it, under one chain; the
        others run within their fusion, and their chain is "".
        """
        called = self.module.computations[fusion.called("calls")[0]]
        all_found = []
        for inner in called.instructions.values():
            if inner.opcode == "fusion":
                all_found += self.fused_collectives(inner)
            if not kind_of(inner.opcode):
                continue
            chain, channel = _CHAIN.search(inner.attributes), _CHANNEL.search(inner.attributes)
            found = self.collective(called, inner)
            if found.kind == "all-reduce" and _keeps_a_shard(called, inner):
                found = dataclasses.replace(found, kind="reduce-scatter")
            key = f"chain {chain.group(1)} {channel.group(1) if channel else ''}" if chain else ""
            all_found.append((key, found))
        return all_found

    def collective(self, computation: hlo.Computation, instruction: hlo.Instruction) -> Collective:
        shapes = [computation.instructions[name].shape for name in instruction.operands]
        return read(instruction, shapes, self.mesh_shape, count=1)


def _computing(block: Block) -> Block:
    """What of a block is work: without its collectives, which are counted where they begin."""
    items: list[Op | Block] = []
    for item in block.items:
        if isinstance(item, Block):
            items.append(_computing(item))
        elif item.cycles or item.kernel or item.lacks_estimate:
            items.append(dataclasses.replace(item, begins=(), ends=()))
    return dataclasses.replace(block, items=tuple(items))


def _exchanged(exchange: Transfer, *, at_start: bool) -> Op:
    """The first or the last instruction of an exchange between slices."""
    begins = (Begun(exchange.send, exchange.collective),) if at_start else ()
    return Op(exchange.send, exchange.collective.source, begins=begins, ends=() if at_start else (exchange.send,))


def _dearness(block: Block) -> tuple[int, int, int]:
    """Kernels first: they are the longest work that there is, and the compiler gives them no cycles."""
    kernels = sum(times for op, times in block.each() if op.kernel)
    return kernels, block.cycles, sum(item.count * item.bytes_each for item in block.collectives())


_LITERALS = ("parameter", "constant", "iota")  # whose argument names no operands


def _begun_by(computation: hlo.Computation, done: hlo.Instruction) -> str:
    """The name of the instruction that began what this one waits for, as far as it is in this computation."""
    instruction = done
    while instruction.opcode not in _LITERALS and instruction.operands and not instruction.opcode.endswith("-start"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction.name


def _copy(start: hlo.Instruction) -> Copy:
    """Its shape is (to, from, context). S(5) is the host's memory."""
    return Copy(hlo.array_bytes(start.shape)[0], host="S(5)" in start.shape)


def _settings(instruction: hlo.Instruction) -> dict[str, Any]:
    """What a kernel's metadata says: JSON inside of JSON."""
    found = _SETTINGS.search(instruction.attributes)
    if not found:
        return {}
    try:
        settings = json.loads(json.loads(f'"{found.group(1)}"'))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


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
