"""Reads the text of a compiled program (HLO): computations, instructions, shapes, and how often a loop runs.

It knows what HLO text is and nothing of cost (cost.py) or networks (collectives.py). The compiler has no interface
that gives schedules with trip counts, so its text is read; forms of libtpu 0.0.42 to 0.0.50 are known. What is not
understood is None, never a guess.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = ")
_END = re.compile(r"^\}(, execution_thread=\"\w+\")?$")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_NO_ESTIMATE = 2**62  # the largest number there is stands where the compiler has none (gathers of the sparse core)
_ELEMENT = re.compile(r"%(([\w.\-]+)#(\d+))(?![\w#])")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `argument` is the text between the parentheses: operands, a parameter's number or a literal."""

    name: str
    shape: str
    opcode: str
    argument: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        return tuple(part.split()[-1].lstrip("%") for part in split(_COMMENT.sub("", self.argument)) if part.strip())

    @functools.cached_property
    def source(self) -> str:
        """The name that jax gave the operation, such as jit(step)/mlp/mul; "" where it has none."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1).replace("\\'", "'") if found else ""

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution on the TensorCore; None where it has none."""
        found = _CYCLES.search(self.attributes)
        cycles = int(found.group(1)) if found else _NO_ESTIMATE
        return cycles if cycles < _NO_ESTIMATE else None

    def called(self, *kinds: str) -> tuple[str, ...]:
        """Names of the computations it refers to as `kinds` (such as "calls", "body")."""
        return tuple(name for kind, name in _CALLED.findall(self.attributes) if kind in kinds)

    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional, in either form of writing them."""
        found = _BRANCHES.search(self.attributes)
        if found:
            return tuple(name.strip().lstrip("%") for name in found.group(1).split(","))
        return self.called("true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions, in schedule order."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program. donated: (output, argument) by number, where the one replaces the other in its place."""

    computations: Mapping[str, Computation]
    entry: str
    donated: tuple[tuple[int, int], ...] = ()


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` prints; ValueError when it has no entry."""
    computations: dict[str, Computation] = {}
    entry = None
    name, lines = "", []
    for line in text.splitlines():
        header = None if name else _HEADER.match(line)
        if header:
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif name and _END.match(line):
            computations[name] = _computation(name, lines)
            name = ""
        elif name and _NAME.match(line):
            lines.append(line)
        elif name:
            lines[-1] += line  # attributes of Pallas kernels hold line breaks
    if entry is None:
        raise ValueError("this text is no HLO module: it has no ENTRY")
    return Module(computations, entry, tuple(_donated(text.partition("\n")[0])))


def _donated(header: str) -> list[tuple[int, int]]:
    """
    >>> _donated("HloModule m, input_output_alias={ {0}: (3, {}, may-alias), {1}: (4, {}, must-alias) }, x=1")
    [(0, 3), (1, 4)]
    """
    start = header.find("input_output_alias={")
    end = header.find(" }", start)
    found = re.findall(r"\{(\d*)\}: \((\d+), \{\}", header[start:end]) if start >= 0 else []
    return [(int(output or 0), int(number)) for output, number in found]


def _computation(name: str, lines: Sequence[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        found = _NAME.match(line)
        assert found is not None
        instruction = _instruction(found.group(2), line[found.end() :])
        for name, source, index in _ELEMENT.findall(instruction.argument):
            if name not in instructions and source in instructions:  # an element that is named by its place
                instructions[name] = _element(name, instructions[source], int(index))
        instructions[found.group(2)] = instruction
        root = found.group(2) if found.group(1) else root
    return Computation(name, instructions, root)


def _element(name: str, source: Instruction, index: int) -> Instruction:
    """What the operand `%source#index` stands for, a form of dumps of libtpu 0.0.50."""
    parts = split(_COMMENT.sub("", source.shape)[1:-1])
    return Instruction(name, parts[index].strip(), "get-tuple-element", f"%{source.name}", f"index={index}")


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(name, shape, rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :].lstrip(", "))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; quoted text is skipped."""
    depth, quoted, index = 0, False, start
    while index < len(text):
        character = text[index]
        if quoted:
            index += character == "\\"
            quoted = character != '"'
        elif character == '"':
            quoted = True
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return len(text)


def split(text: str) -> list[str]:
    """Parts of a list between commas that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


# Shapes.


def array_bytes(shape: str) -> tuple[int, ...]:
    """Bytes of each array in a shape or tuple of shapes, without the padding of the layout.

    >>> array_bytes("(bf16[4,128]{1,0:T(8,128)(2,1)}, f32[])")
    (1024, 4)
    """
    sizes = []
    for dtype, dims in _ARRAY.findall(_COMMENT.sub("", shape)):
        sizes.append(math.ceil(math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d) * bits(dtype) / 8))
    return tuple(sizes)


def bits(dtype: str) -> int:
    """Of a number; 0 for what is none.

    >>> bits("bf16"), bits("f8e4m3fn"), bits("pred"), bits("token")
    (16, 8, 8, 0)
    """
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 0


# Trip counts. A loop that jax.lax.scan or fori_loop wrote counts a scalar from a constant by a constant to a constant,
# but the compiler moves these constants about: into the body, into the loop's state, into fusions. So the scalars are
# evaluated: int, bool, None (unknown) or a list of these for a tuple.


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often a loop runs its body: `count` times, or at most so often where data may end it before (not `exact`)."""

    count: int
    exact: bool


def trips(module: Module, computation: Computation, loop: Instruction, arguments: Sequence) -> Trips | None:
    """Of a `while` in `computation`; None when data alone ends it.

    `arguments` are the known values of the parameters of `computation` (see `loop_arguments`). A loop goes on while all
    parts of an `and` hold, so each part that counts is a limit.
    """
    known = _KNOWN_TRIPS.search(loop.attributes)
    if known:
        return Trips(int(known.group(1)), exact=True)
    condition = module.computations[loop.called("condition")[0]]
    states = _states(module, computation, loop, arguments)
    found = [_comparisons(module, condition, condition.root, [state], None) for state in states]
    counts = [_turns(part) for part in zip(*found, strict=True)]
    limits = [count for count in counts if count is not None]
    return Trips(min(limits), exact=len(limits) == len(counts)) if limits else None


def _turns(comparisons: Sequence) -> int | None:
    """Iterations that a comparison allows, of what it compares at the start of the first three."""
    if any(item is None for item in comparisons):
        return None
    direction = comparisons[0][0]
    gaps = [left - right for _, left, right in comparisons]
    step = gaps[1] - gaps[0]
    return _count(direction, gaps[0], step) if gaps[2] - gaps[1] == step else None


def loop_arguments(module: Module, computation: Computation, loop: Instruction, arguments: Sequence) -> list:
    """The values that a loop's body and condition can rely on in every iteration: those that it does not change."""
    first, second, third = _states(module, computation, loop, arguments)
    if not isinstance(first, list):
        return [None]
    return [[a if a == b == c else None for a, b, c in zip(first, second, third, strict=True)]]


def _states(module: Module, computation: Computation, loop: Instruction, arguments: Sequence) -> list:
    """The loop's state at the start of its first three iterations."""
    body = module.computations[loop.called("body")[0]]
    states = [_value(module, computation, loop.operands[0], arguments)]
    for _ in range(2):
        states.append(_value(module, body, body.root, [states[-1]]))
    lengths = {len(state) if isinstance(state, list) else -1 for state in states}
    return states if len(lengths) == 1 else [None, None, None]


def _count(direction: str, gap: int, step: int) -> int | None:
    """Iterations of `while gap < 0: gap += step` and its kin; None if it does not end or the form is unknown."""
    if direction in ("GT", "GE"):
        gap, step = -gap, -step
    if direction in ("LE", "GE"):
        gap -= 1
    if direction in ("LT", "LE", "GT", "GE"):
        if gap >= 0:
            return 0
        return -(gap // step) if step > 0 else None
    if direction == "NE":
        if gap == 0:
            return 0
        return -gap // step if step and -gap % step == 0 and -gap // step > 0 else None
    return None


def _comparisons(
    module: Module, computation: Computation, name: str, arguments: Sequence, outside: Callable[[int], list] | None
) -> list:
    """[(direction, left, right)] of the compares that must all hold, None in place of each that is not understood.

    outside: of a fused computation, the comparisons that its parameter of this number stands for.
    """
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands

    def operand(index: int) -> list:
        return _comparisons(module, computation, operands[index], arguments, outside)

    if opcode == "and":
        return operand(0) + operand(1)
    if opcode == "compare":
        sides = [_value(module, computation, operand, arguments) for operand in operands]
        direction = re.search(r"direction=(\w+)", instruction.attributes)
        if direction is None or any(type(side) is not int for side in sides):
            return [None]
        return [(direction.group(1), *sides)]
    if opcode in ("copy", "bitcast", "reshape", "convert"):
        return operand(0)
    if opcode == "parameter" and outside is not None:
        return outside(int(instruction.argument))
    if opcode in ("fusion", "call"):
        called = module.computations[instruction.called("calls", "to_apply")[0]]
        values = [_value(module, computation, operand, arguments) for operand in operands]
        return _comparisons(module, called, called.root, values, operand)
    return [None]


# No min, max or select: equal in three iterations would then prove nothing for the rest.
_ARITHMETIC: Mapping[str, Callable] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "negate": lambda a: -a,
}
_COUNTS = re.compile(r"\(|[su]\d+\[\]")  # a tuple, or an integer
_SAME = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "optimization-barrier")


def _value(module: Module, computation: Computation, name: str, arguments: Sequence):
    """What a scalar (or each scalar of a tuple) is, given the parameters; None where it is not known."""
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands

    def operand(index: int):
        return _value(module, computation, operands[index], arguments)

    if opcode == "parameter":
        number = int(instruction.argument)
        return arguments[number] if number < len(arguments) else None
    if not _COUNTS.match(instruction.shape):
        return None  # before anything is worked out for it, such as the loop that it comes from
    if opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", instruction.attributes).group(1))  # type: ignore[union-attr]
        source = computation.instructions[operands[0]]
        if source.opcode == "tuple":
            return _value(module, computation, source.operands[index], arguments)
        whole = operand(0)
        return whole[index] if isinstance(whole, list) else None
    if opcode == "tuple":
        return [operand(index) for index in range(len(operands))]
    if opcode in _SAME and instruction.shape.startswith("("):
        return operand(0)
    if instruction.shape.startswith("("):
        return loop_arguments(module, computation, instruction, arguments)[0] if opcode == "while" else None
    if opcode == "constant":
        return int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument) else None
    if opcode in _SAME:
        return operand(0)
    if opcode in _ARITHMETIC:
        values = [operand(index) for index in range(len(operands))]
        return _ARITHMETIC[opcode](*values) if all(type(value) is int for value in values) else None
    if opcode in ("fusion", "call"):
        called = module.computations[instruction.called("calls", "to_apply")[0]]
        return _value(module, called, called.root, [operand(index) for index in range(len(operands))])
    return None
