"""What a program's memory is made of: at its worst moment, by buffer and over the schedule.

Read from the scheduled text of the program (buffers.py), so that it can be compared with the compiler's own peak. That
peak decides whether the compiler takes a program: it counts what lives at once, without gaps between buffers.

Parts follow from where a buffer's content comes from and goes to: what is made of weights alone is a weight, cast or
gathered; what the forward pass makes and the backward pass reads was saved; what the backward pass makes and no product
reads is a gradient of weights. A program without a backward pass has neither, and its outputs are named as such: of a
prefill the cache. Not here: seconds.
"""

import dataclasses
import re

import numpy as np

from t5x_like.planner import hlo
from t5x_like.planner.memory import buffers, layouts
from t5x_like.planner.time.regions import classify

PARTS = (
    "parameters",
    "optimizer state",
    "frozen parameters",
    "cache",
    "batch",
    "weights, cast or gathered",
    "saved activations",
    "gradients",
    "logits and loss",
    "activations at work",
    "outputs",
    "other",
)
# Arguments of a program by the begin of their names. `state` and `frozen` are those of a train step.
_ARGUMENTS = {
    r"state\['params'\]": "parameters",
    r"state\['optimizer'\]": "optimizer state",
    r"frozen\b": "frozen parameters",
    r"params\b|weights\b": "parameters",
    r"cache\b": "cache",
    r"batch\b|source\b|rows\b|tokens(_BT?)?\b|positions_B\b|lengths_B\b": "batch",
}
_WEIGHTS = {"parameters", "frozen parameters"}
_LISTED = 12  # buffers
_POINTS = 160  # of the timeline
_PREPARES = ("copy", "broadcast", "custom-call", "bitcast", "convert")


@dataclasses.dataclass(frozen=True)
class Large:
    """A buffer that is there at the peak. operation: what writes it, or the argument that it is, as jax names it."""

    bytes: int
    shape: str
    part: str
    operation: str
    region: str
    which: str


@dataclasses.dataclass(frozen=True)
class Moment:
    """The worst moment of a stretch of the program; at: its end, as a share of all estimated cycles."""

    at: float
    bytes: int
    parts: dict[str, int]
    region: str
    which: str


@dataclasses.dataclass(frozen=True)
class Held:
    """HBM of one device. peak_bytes: the most that lives at once, arguments and outputs included; parts: what that is,
    in the order of PARTS; aliased_bytes: of outputs that replace arguments; vector_bytes, host_bytes: the most that the
    program keeps in the vector memory and in the memory of the host; read_peak_bytes: the most that lives at once where
    an argument counts until it is read for the last time, unless an output replaces it."""

    peak_bytes: int
    arguments_bytes: int
    outputs_bytes: int
    aliased_bytes: int
    parts: dict[str, int]
    largest: tuple[Large, ...]
    timeline: tuple[Moment, ...]
    vector_bytes: int
    host_bytes: int
    read_peak_bytes: int = 0


def held(text: str) -> Held:
    """Of the program in `text` (`compiled.as_text()`, scheduled). ValueError where it is none."""
    schedule = buffers.schedule(hlo.parse(text))
    named = {number: _argument(name) for number, name in enumerate(schedule.arguments)}
    steps = len(schedule.steps)
    amounts = np.zeros((len(PARTS), steps + 2), np.int64)
    let_go = np.zeros(steps + 2, np.int64)
    elsewhere = {space: np.zeros(steps + 2, np.int64) for space in (layouts.VMEM, layouts.HOST)}
    part_of = _part if any(_pass(step) == "backward" for step in schedule.steps) else _part_of_forward
    parts = {}
    for number, buffer in enumerate(schedule.buffers):
        if buffer.space == layouts.HBM:
            parts[number] = part_of(buffer, schedule, named)
            line = amounts[PARTS.index(parts[number])]
            if buffer.argument and not buffer.output:
                let_go[buffer.last_use + 1] += buffer.bytes
                let_go[buffer.end + 1] -= buffer.bytes
        elif buffer.space in elsewhere:
            line = elsewhere[buffer.space]
        else:
            continue
        line[buffer.start] += buffer.bytes
        line[buffer.end + 1] -= buffer.bytes
    amounts = amounts.cumsum(axis=1)
    peak = int(amounts.sum(axis=0).argmax())
    there = [(schedule.buffers[n], part) for n, part in parts.items()]
    there = [(buffer, part) for buffer, part in there if buffer.start <= peak <= buffer.end]
    there.sort(key=lambda item: -item[0].bytes)
    given = [buffer for buffer in schedule.buffers if buffer.space == layouts.HBM]
    return Held(
        peak_bytes=int(amounts[:, peak].sum()),
        arguments_bytes=sum(buffer.bytes for buffer in given if buffer.argument),
        outputs_bytes=sum(buffer.bytes for buffer in given if buffer.output),
        aliased_bytes=sum(buffer.bytes for buffer in given if buffer.output and buffer.argument),
        parts=_named(amounts[:, peak]),
        largest=tuple(_large(buffer, part) for buffer, part in there[:_LISTED]),
        timeline=_timeline(schedule, amounts),
        vector_bytes=int(elsewhere[layouts.VMEM].cumsum().max()),
        host_bytes=int(elsewhere[layouts.HOST].cumsum().max()),
        read_peak_bytes=int((amounts.sum(axis=0) - let_go.cumsum()).max()),
    )


NOTHING = Held(0, 0, 0, 0, {}, (), (), 0, 0)


def held_or_nothing(text: str) -> Held:
    """`held`, or NOTHING where the text has a form that is not known; what the compiler says of memory stands."""
    try:
        return held(text)
    except (AssertionError, KeyError, IndexError, ValueError):
        return NOTHING


def _named(column: np.ndarray) -> dict[str, int]:
    return {part: int(size) for part, size in zip(PARTS, column, strict=True) if size}


# Parts.


def _argument(name: str) -> str:
    return next((part for begin, part in _ARGUMENTS.items() if re.match(begin, name)), "other")


def _pass(step: buffers.Step) -> str:
    return classify(step.instruction.source)[1]


def _part_of_forward(buffer: buffers.Buffer, schedule: buffers.Schedule, named: dict[int, str]) -> str:
    """Of a program without a backward pass."""
    if buffer.output and not buffer.argument:
        return "outputs"
    part = _part(buffer, schedule, named)
    return "activations at work" if part in ("gradients", "saved activations") else part


def _part(buffer: buffers.Buffer, schedule: buffers.Schedule, named: dict[int, str]) -> str:
    if buffer.argument:
        return _argument(buffer.argument)
    sources = {named[number] for number in buffer.kinds}
    if sources and sources <= _WEIGHTS:
        return "weights, cast or gathered"
    if "optimizer state" in sources:
        return "other"  # of the update
    regions = [classify(maker.source) for maker in buffer.makers if maker.source]
    region = _origin(buffer)[0]
    passes = {which for _, which in regions}
    read_by = {_pass(schedule.steps[step - 1]) for step in buffer.reads}
    if "forward" in passes and read_by & {"backward", "recomputed"}:
        return "logits and loss" if region == "head and loss" and not buffer.feeds_contraction else "saved activations"
    if not buffer.feeds_contraction and ("backward" in passes or "parameters" in sources and "forward" not in passes):
        return "gradients"
    if region == "head and loss":
        return "logits and loss"
    return "activations at work" if passes - {"", "update"} else "other"


def _origin(buffer: buffers.Buffer) -> tuple[str, str, str]:
    """(region, pass, operation) of what gives a buffer its content, rather than room or another layout."""
    best = ("rest", "", "")
    for maker in buffer.makers:
        region, which = classify(maker.source)
        prepares = maker.opcode in _PREPARES and "pallas" not in maker.source
        if maker.source and (not best[2] or not prepares):
            best = (region, which, maker.source)
    return best


def _large(buffer: buffers.Buffer, part: str) -> Large:
    region, which, operation = _origin(buffer)
    if not operation and buffer.makers:
        operation = buffer.makers[-1].name
    if buffer.argument:
        region, which, operation = "", "", buffer.argument
    return Large(buffer.bytes, buffer.text, part, operation, region, which)


def _timeline(schedule: buffers.Schedule, amounts: np.ndarray) -> tuple[Moment, ...]:
    """The program in stretches of equal estimated cycles, a loop as long as all its turns; what has no estimate
    (kernels, collectives) has no length, but its memory counts to the stretch that it lies in."""
    weights = np.array([step.times * step.cycles for step in schedule.steps], np.float64) + 1e-9
    ends = weights.cumsum() / weights.sum()
    bins = np.minimum((ends * _POINTS).astype(int), _POINTS - 1)
    total = amounts.sum(axis=0)[1 : len(ends) + 1]  # buffers count from step 1 on
    found = []
    for number in np.unique(bins):
        inside = np.flatnonzero(bins == number)
        worst = int(inside[total[inside].argmax()])
        named = [classify(schedule.steps[step].instruction.source) for step in inside]
        region, which = next((item for item in named if item[0] != "rest"), ("rest", ""))
        found.append(
            Moment(float(number + 1) / _POINTS, int(total[worst]), _named(amounts[:, worst + 1]), region, which)
        )
    return tuple(found)
