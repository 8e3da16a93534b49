"""Which outputs of an instruction lie where its operands lay, as its text says or, where that is silent, its kind asks.

The TPU compiler lists in each instruction what shares a buffer. Other texts leave it to rules: an update writes into
what it updates, and what gives one element for one element may overwrite an operand that nobody reads afterwards.
"""

import re

from t5x_like.planner import hlo

_LISTED = re.compile(r'"aliasing_operands":\{"lists":\[((?:\{"indices":\[[^\]]*\]\},?)*)\]\}')
_PAIR = re.compile(r"\{(\d*)\}: \((\d+), \{\}")
_UPDATES = ("dynamic-update-slice", "scatter")
_CONTRACTIONS = ("dot", "convolution", "ragged-dot")
_ELEMENTWISE = frozenset(
    "add subtract multiply divide maximum minimum power and or xor not negate abs exponential log tanh sqrt rsqrt sign "
    "logistic sine cosine floor ceil select compare clamp convert copy all-reduce exponential-minus-one".split()
)


def listed(instruction: hlo.Instruction) -> list[list[int]] | None:
    """Groups of arrays in one buffer, by number: those of operands first, then those of outputs. None where the text
    does not say."""
    found = _LISTED.search(instruction.attributes)
    if found is None:
        return None
    return [[int(number) for number in re.findall(r"\d+", group)] for group in re.findall(r"\[([^\]]*)\]", found[1])]


def overwritten(module: hlo.Module, instruction: hlo.Instruction) -> list[tuple[int, int | None]]:
    """(operand, output) by number that must share a buffer, of an instruction that lists nothing; output None: all."""
    if instruction.opcode in _UPDATES:
        return [(0, None)]
    if instruction.opcode == "custom-call" and "output_to_operand_aliasing" in instruction.attributes:
        pairs = _PAIR.findall(instruction.attributes)
        return [(int(operand), int(output) if output else None) for output, operand in pairs]
    if instruction.opcode != "fusion":
        return []
    called = module.computations[instruction.called("calls")[0]]
    root = called.instructions[called.root]
    if root.opcode != "tuple":
        number = _updated(called, root)
        return [] if number is None else [(number, None)]
    numbers = [_updated(called, called.instructions[name]) for name in root.operands]
    return [(number, output) for output, number in enumerate(numbers) if number is not None]


def _updated(computation: hlo.Computation, item: hlo.Instruction) -> int | None:
    """The number of the parameter that a fused update overwrites, None for what is no update."""
    while item.opcode in ("bitcast", "copy", "reshape", "convert"):
        item = computation.instructions[item.operands[0]]
    if item.opcode not in _UPDATES:
        return None
    target = computation.instructions[item.operands[0]]
    while target.opcode in ("bitcast", "reshape", "convert"):
        target = computation.instructions[target.operands[0]]
    return int(target.argument) if target.opcode == "parameter" else None


def may_overwrite(instruction: hlo.Instruction) -> bool:
    """Whether an output may lie where an operand of equal size did that nobody reads afterwards."""
    return instruction.opcode in _ELEMENTWISE or "kind=kLoop" in instruction.attributes


def contracts(module: hlo.Module, instruction: hlo.Instruction) -> bool:
    """Whether it is a matrix product or a kernel, itself or inside of it."""
    if instruction.opcode in _CONTRACTIONS or "tpu_custom_call" in instruction.attributes:
        return True
    if instruction.opcode != "fusion":
        return False
    called = module.computations[instruction.called("calls")[0]]
    return any(contracts(module, inner) for inner in called.instructions.values())
