"""Which buffers a compiled program needs, and from which instruction to which each of them is in use.

The text of a program is scheduled: instructions stand in the order in which they run. Values that share a buffer are
put together: elements of tuples, what only renames (bitcast), the state of a loop at its start, in its body and after
it, what is updated in place, an argument and the output that replaces it. The compiler says in each instruction which
operands its outputs overwrite ("aliasing_operands"); where a text does not say it, as of a CPU, it is worked out.

A loop's body is gone through once: what a turn needs is free again at the next, but for the state. What a turn needs
is therefore counted on top of what lives around the loop, at the turn's worst moment.

Not here: what buffers are for (peak.py), where the compiler lays them, which takes some more room for the gaps.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from t5x_like.planner import hlo
from t5x_like.planner.memory import aliases, layouts
from t5x_like.planner.time.regions import classify

_INDEX = re.compile(r"index=(\d+)")

# What makes no buffer: it names what is there. Constants lie with the program.
_RENAMES = ("bitcast", "optimization-barrier", "domain", "add-dependency", "async-update")
_NOTHING = ("constant", "after-all", "partition-id", "replica-id")


@dataclasses.dataclass(frozen=True)
class Maker:
    """An instruction that writes a buffer, at `time`. source: the operation of the program that it comes from."""

    time: int
    name: str
    opcode: str
    source: str
    shape: str


@dataclasses.dataclass
class Buffer:
    """In use from `start` to `end`, both included, in steps that count from 1.

    last_use: the step that touches it last, which of an argument is no reason to let it go.
    text: the array, such as bf16[4,128]; argument: the name of the entry's argument that lies in it, or ""; output:
    whether the program gives it back; reads: steps that read it; kinds: numbers of the arguments that its content comes
    from; feeds_contraction: whether a matrix product takes its content in, at once or later.
    """

    bytes: int
    space: int
    start: int
    end: int
    argument: str = ""
    output: bool = False
    makers: list[Maker] = dataclasses.field(default_factory=list)
    kinds: set[int] = dataclasses.field(default_factory=set)
    feeds_contraction: bool = False
    reads: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    last_use: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction in the order of the schedule, the bodies of loops once. times: how often it runs."""

    computation: str
    instruction: hlo.Instruction
    times: int

    @property
    def cycles(self) -> int:
        """The compiler's estimate of one execution; 0 where it has none."""
        return self.instruction.cycles or 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a program holds when. arguments: names of the entry's arguments by number."""

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arguments: tuple[str, ...]


# A value is a buffer's number, or a tuple of values.
Value: TypeAlias = "int | tuple[Value, ...]"


def schedule(module: hlo.Module) -> Schedule:
    """The buffers of a program. ValueError where its text is no program of a form that is known."""
    walk = _Walk(module)
    return walk.run()


class _Walk:
    """Goes through a program once and keeps which buffer is touched when."""

    def __init__(self, module: hlo.Module) -> None:
        self.module = module
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.parent: list[int] = []
        self.names: dict[int, str] = {}
        self.may_share: list[tuple[int, int, int]] = []  # (time, operand, output)
        self.edges: list[tuple[int, int]] = []  # content of the first goes into the second
        self.contracted: list[tuple[list[int], list[int]]] = []

    def run(self) -> Schedule:
        entry = self.module.computations[self.module.entry]
        arguments = sorted(
            (int(item.argument), item) for item in entry.instructions.values() if item.opcode == "parameter"
        )
        values = []
        for number, item in arguments:
            self.names[number] = item.source or item.name
            value = self.fresh(item.shape, None)
            for buffer in self.of(value):
                buffer.argument, buffer.kinds = self.names[number], {number}
            values.append(value)
        root = self.computation(entry, values, times=1, arguments=[])
        last = len(self.steps)
        outputs = root if isinstance(root, tuple) else (root,)
        for buffer in self.of(root):
            buffer.output = True
        for output, number in self.module.donated:
            self.join(outputs[output], values[number])
        self.share_operands()
        self.spread()
        found = {self.find(index): None for index in range(len(self.buffers))}
        kept = [self.buffers[index] for index in found]
        for buffer in kept:
            buffer.last_use = buffer.end
            if buffer.argument:  # has its place from the start, and cannot be let go of
                buffer.start, buffer.end = 0, last
            if buffer.output:
                buffer.end = last
        names = tuple(self.names[number] for number in sorted(self.names))
        return Schedule(tuple(self.steps), tuple(buffer for buffer in kept if buffer.bytes), names)

    # Buffers.

    def fresh(self, shape: "str | layouts.Tree", maker: Maker | None) -> Value:
        tree = layouts.tree(shape) if isinstance(shape, str) else shape
        if isinstance(tree, tuple):
            return tuple(self.fresh(part, maker) for part in tree)
        now = len(self.steps)
        self.buffers.append(Buffer(tree.bytes, tree.space, now, now, makers=[maker] if maker else [], text=tree.text))
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]
            index = self.parent[index]
        return index

    def of(self, value: Value) -> Iterator[Buffer]:
        for index in _flat(value):
            yield self.buffers[self.find(index)]

    def touch(self, value: Value, *, reads: bool = False) -> None:
        for buffer in self.of(value):
            buffer.end = max(buffer.end, len(self.steps))
            if reads:
                buffer.reads.append(len(self.steps))

    def join(self, first: Value, second: Value) -> None:
        """Puts values into the same buffers."""
        for a, b in zip(_flat(first), _flat(second), strict=False):
            a, b = self.find(a), self.find(b)
            if a == b:
                continue
            kept, gone = self.buffers[a], self.buffers[b]
            self.parent[b] = a
            kept.start, kept.end = min(kept.start, gone.start), max(kept.end, gone.end)
            kept.text = gone.text if gone.bytes > kept.bytes else kept.text
            kept.bytes, kept.space = max(kept.bytes, gone.bytes), gone.space if gone.argument else kept.space
            kept.reads += gone.reads
            kept.argument = kept.argument or gone.argument
            kept.output |= gone.output
            kept.makers += gone.makers
            kept.kinds = gone.kinds if gone.argument else kept.kinds if kept.argument else kept.kinds | gone.kinds

    def share_operands(self) -> None:
        """Lets outputs overwrite operands that nobody reads afterwards, where the text does not say what does."""
        for time, operand, output in self.may_share:
            before, after = self.buffers[self.find(operand)], self.buffers[self.find(output)]
            fits = before.bytes == after.bytes and before.space == after.space
            if before is not after and fits and before.end == time and after.start == time and not before.argument:
                self.join(operand, output)

    def spread(self) -> None:
        """Of each buffer, the arguments that its content comes from, and whether a product takes it in."""
        after: dict[int, set[int]] = {}
        for source, target in self.edges:
            source, target = self.find(source), self.find(target)
            if source != target and not self.buffers[target].argument:  # what replaces an argument is another value
                after.setdefault(source, set()).add(target)
        waiting = {self.find(index) for index in range(len(self.buffers)) if self.buffers[self.find(index)].kinds}
        while waiting:
            source = waiting.pop()
            for target in after.get(source, ()):
                if not self.buffers[source].kinds <= self.buffers[target].kinds:
                    self.buffers[target].kinds |= self.buffers[source].kinds
                    waiting.add(target)
        before: dict[int, set[int]] = {}
        for source, targets in after.items():
            for target in targets:
                before.setdefault(target, set()).add(source)
        waiting = set()
        for sources, outputs in self.contracted:  # what it adds to, in place, is none of its factors
            waiting |= {self.find(index) for index in sources} - {self.find(index) for index in outputs}
        while waiting:
            target = waiting.pop()
            if not self.buffers[target].feeds_contraction:
                self.buffers[target].feeds_contraction = True
                waiting |= before.get(target, set())

    # Instructions.

    def computation(
        self, computation: hlo.Computation, given: Sequence[Value], *, times: int, arguments: Sequence
    ) -> Value:
        """Goes through a computation with these values of its parameters; the value of its root."""
        values: dict[str, Value] = {}
        for instruction in computation.instructions.values():
            self.steps.append(Step(computation.name, instruction, times))
            operands = [values[name] for name in instruction.operands] if instruction.opcode not in _LITERALS else []
            if instruction.opcode == "parameter":
                values[instruction.name] = given[int(instruction.argument)]
            elif instruction.opcode == "while":
                values[instruction.name] = self.loop(computation, instruction, operands[0], times, arguments)
            else:
                values[instruction.name] = self.instruction(instruction, operands, times)
        self.touch(values[computation.root])
        return values[computation.root]

    def loop(
        self, computation: hlo.Computation, loop: hlo.Instruction, state: Value, times: int, arguments: Sequence
    ) -> Value:
        trips = hlo.trips(self.module, computation, loop, arguments)
        turns = times * (1 if trips is None else trips.count)
        known = hlo.loop_arguments(self.module, computation, loop, arguments)
        body, condition = (self.module.computations[loop.called(part)[0]] for part in ("body", "condition"))
        self.touch(state)
        after = self.computation(body, [state], times=turns, arguments=known)
        self.join(state, after)
        self.computation(condition, [state], times=turns + times, arguments=known)
        self.touch(state)
        return state

    def instruction(self, instruction: hlo.Instruction, operands: Sequence[Value], times: int) -> Value:
        opcode = instruction.opcode
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element":
            index = _INDEX.search(instruction.attributes)
            assert index is not None and isinstance(operands[0], tuple), instruction.name
            return operands[0][int(index.group(1))]
        if opcode in _RENAMES:
            return operands[0]
        if opcode in _NOTHING:
            return self.fresh(_without_bytes(layouts.tree(instruction.shape)), None)
        for operand in operands:
            self.touch(operand, reads=True)
        if opcode == "conditional":
            return self.conditional(instruction, operands, times)
        if opcode == "call":
            called = self.module.computations[instruction.called("to_apply", "calls")[0]]
            return self.computation(called, operands, times=times, arguments=[])
        if opcode.endswith("-done"):
            return _finished(opcode, operands[0]) if isinstance(operands[0], tuple) else operands[0]
        if opcode.endswith("-start") or opcode in ("send", "recv"):
            return self.started(instruction, operands, times)
        return self.made(instruction, operands)

    def conditional(self, instruction: hlo.Instruction, operands: Sequence[Value], times: int) -> Value:
        branches = [self.module.computations[name] for name in instruction.branches()]
        given = operands[1:] if len(operands) == len(branches) + 1 else [operands[-1]] * len(branches)
        found = []
        for branch, value in zip(branches, given, strict=True):
            found.append(self.computation(branch, [value], times=times, arguments=[]))
        for value in found[1:]:
            self.join(found[0], value)
        for value in operands:
            self.touch(value)
        return found[0]

    def made(self, instruction: hlo.Instruction, operands: Sequence[Value]) -> Value:
        """The value of an instruction that writes buffers, its own or those of operands."""
        value = self.fresh(instruction.shape, self.maker(instruction))
        sources, outputs = list(_flat(tuple(operands))), list(_flat(value))
        self.edges += itertools.product(sources, outputs)
        if aliases.contracts(self.module, instruction) and classify(self.maker(instruction).source)[1] != "update":
            self.contracted.append((sources, outputs))
        groups = aliases.listed(instruction)
        if groups is not None:
            everything = [*sources, *outputs]
            for group in groups:
                same = [everything[number] for number in group if number < len(everything)]
                written = [index for index in same if index in outputs]
                for index in same if written else []:
                    self.join(index, written[0])
            return value
        for operand, output in aliases.overwritten(self.module, instruction):
            self.join(operands[operand], value[output] if output is not None and isinstance(value, tuple) else value)
        if aliases.may_overwrite(instruction):
            time = len(self.steps)
            self.may_share += [(time, source, output) for output in outputs for source in sources]
        return value

    def started(self, instruction: hlo.Instruction, operands: Sequence[Value], times: int) -> Value:
        """The value of the first half of something asynchronous: (operands, outputs, context...), or only outputs."""
        tree, maker = layouts.tree(instruction.shape), self.maker(instruction)
        if not isinstance(tree, tuple) or instruction.opcode in ("all-reduce-start", "recv"):
            return self.made(instruction, operands)
        if instruction.opcode == "copy-start":
            value: Value = (self.fresh(tree[0], maker), operands[0], *(self.fresh(part, None) for part in tree[2:]))
        elif instruction.opcode == "send":
            value = (operands[0], *(self.fresh(part, None) for part in tree[1:]))
        else:
            first = tuple(operands) if isinstance(tree[0], tuple) else operands[0]
            value = (first, *(self.fresh(part, maker) for part in tree[1:]))
        self.edges += itertools.product(_flat(tuple(operands)), _flat(value))
        return value

    def maker(self, instruction: hlo.Instruction) -> Maker:
        return Maker(len(self.steps), instruction.name, instruction.opcode, instruction.source, instruction.shape)


_LITERALS = ("parameter", "constant", "iota")


def _flat(value: Value) -> Iterator[int]:
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _without_bytes(tree: layouts.Tree) -> layouts.Tree:
    if isinstance(tree, tuple):
        return tuple(_without_bytes(part) for part in tree)
    return dataclasses.replace(tree, bytes=0)


def _finished(opcode: str, value: tuple[Value, ...]) -> Value:
    """What the second half of something asynchronous gives."""
    if opcode == "recv-done":
        return (value[0], value[-1])
    return (
        value[0]
        if opcode == "copy-done"
        else value
        if opcode == "all-reduce-done"
        else value[-1 if opcode == "send-done" else 1]
    )
