"""What a program does in the order in which it does it: values that the walk over its text (cost.py) leaves behind.

Not here: how long anything takes (kernels.py, network.py) and what runs beside what (overlap.py).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from t5x_like.planner.time.collectives import Collective


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a Pallas kernel. shapes: of its operands, as HLO writes them; settings: what the kernel says of itself
    in its metadata, such as splash attention's block sizes; {} where it says nothing."""

    name: str
    shapes: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy between memories that runs beside other work: between HBM and VMEM, or between `host` and device."""

    bytes: int
    host: bool


@dataclasses.dataclass(frozen=True)
class Begun:
    """A collective or a copy that begins with an instruction, under a name by which an instruction ends it. The count
    of a collective is that of one execution of the instruction, nearly always 1."""

    key: str
    what: Collective | Copy


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction that takes time. source: the name that jax gave the operation.

    cycles: the compiler's estimate, 0 where it has none, as for work that `lacks_estimate`. flops: of its matrix
    products, of which `eight_bits` {"integers" or "floats": FLOPs} are of numbers of 8 bits. begins: collectives and
    copies that are in flight from its start on; ends: keys of those that are waited for when its own work is done. One
    that nothing else overlaps stands in both.
    """

    name: str
    source: str
    cycles: int = 0
    flops: int = 0
    eight_bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lacks_estimate: bool = False
    kernel: KernelCall | None = None
    begins: tuple[Begun, ...] = ()
    ends: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """Instructions that run `times` times in a row: a loop's body, or, once, the whole program.

    A loop is a block that runs once, with two items: its body, which runs `turns` times, and its condition, which is
    asked once more. loop: its name, "" for what is no loop; turns: None where nobody knows them, and the body counts
    once; surely: whether it runs so often, or data may end it before. A loop of 32 layers, and one of decoding:

        Block(1, (Block(32, layer), Block(33, condition)), "while.1", turns=32)
        Block(1, (Block(256, token), Block(257, condition)), "while.2", turns=256, surely=False)
    """

    times: int
    items: tuple["Op | Block", ...]
    loop: str = ""
    turns: int | None = None
    surely: bool = True

    def each(self) -> Iterator[tuple[Op, int]]:
        """Every instruction with how often it runs."""
        for item in self.items:
            if isinstance(item, Block):
                for op, times in item.each():
                    yield op, times * self.times
            else:
                yield item, self.times

    def collectives(self) -> Iterator[Collective]:
        """Every collective, counted as often as it runs."""
        for op, times in self.each():
            for begun in op.begins:
                if isinstance(begun.what, Collective):
                    yield dataclasses.replace(begun.what, count=begun.what.count * times)

    def loops(self) -> Iterator[tuple["Block", int]]:
        """Every loop with how often it is entered."""
        for item in self.items:
            if isinstance(item, Block):
                if item.loop:
                    yield item, self.times
                for loop, times in item.loops():
                    yield loop, times * self.times

    @property
    def cycles(self) -> int:
        return sum(op.cycles * times for op, times in self.each())
