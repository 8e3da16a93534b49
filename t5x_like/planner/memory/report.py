"""What a program's memory is made of, as text for people and as JSON for programs; what stands in it: peak.py."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_like.core.terminal import format_bytes
from t5x_like.planner.compile import Memory
from t5x_like.planner.memory.peak import Held, Large, Moment

_LISTED = 6  # buffers, in the text


def to_json(memory: Memory, held: Held) -> dict[str, Any]:
    """The key "memory" of a plan. `live_peak_bytes` is ours, by which parts and timeline are; `peak_bytes` is the
    compiler's."""
    return {
        **dataclasses.asdict(memory),
        "total_bytes": memory.total_bytes,
        "live_peak_bytes": held.peak_bytes,
        "vector_bytes": held.vector_bytes,
        "host_bytes": held.host_bytes,
        "parts": held.parts,
        "largest": buffers_json(held.largest),
        "timeline": [_moment_json(moment) for moment in held.timeline],
    }


def buffers_json(largest: Sequence[Large]) -> list[dict[str, Any]]:
    return [_renamed(dataclasses.asdict(item)) for item in largest]


def _moment_json(moment: Moment) -> dict[str, Any]:
    return _renamed(dataclasses.asdict(moment) | {"at": round(moment.at, 4)})


def _renamed(item: dict[str, Any]) -> dict[str, Any]:
    return {"pass" if key == "which" else key: value for key, value in item.items()}


def lines(memory: Memory, held: Held, verdict: str, *, beside_bytes: int | None = None) -> list[str]:
    """The section of the table that `plan` prints. verdict: whether it fits, in words; beside_bytes: what a device
    holds meanwhile besides."""
    total = memory.total_bytes + (beside_bytes or 0)
    beside = "what the run holds and this program does not read"
    more = memory.arguments_bytes + memory.temporaries_bytes > 1.01 * memory.total_bytes
    apart = "   by XLA's count, more than live at once" if more else ""
    in_place = f"{format_bytes(memory.aliased_bytes)} in place of arguments"
    found = [
        "memory (HBM)",
        f"  arguments    {_bytes(memory.arguments_bytes)}",
        f"  temporaries  {_bytes(memory.temporaries_bytes)}{apart}",
        f"  outputs      {_bytes(memory.outputs_bytes)}   {in_place}",
    ]
    if beside_bytes is not None:
        found.append(f"  beside       {_bytes(beside_bytes)}   {beside}")
    found.append(f"  at its peak  {_bytes(total)}   {verdict}")
    if held.host_bytes:
        found.append(f"  on the host  {_bytes(held.host_bytes)}")
    found += [] if not held.vector_bytes else [f"  in VMEM      {_bytes(held.vector_bytes)}   not counted above"]
    found.append(_of_which(memory, held) + (", without what is held beside" if beside_bytes else ""))
    found += [
        f"    {name:<27}{format_bytes(size):>10}" for name, size in sorted(held.parts.items(), key=lambda p: -p[1])
    ]
    return [*found, *buffer_lines(held.largest)]


def _of_which(memory: Memory, held: Held) -> str:
    """The head of the parts, which are ours: whether they are all of the peak."""
    if not held.peak_bytes:
        return "  of which no parts are known: the program's text is not understood"
    if abs(memory.total_bytes - held.peak_bytes) <= 0.01 * memory.total_bytes:
        return "  of which"
    return f"  of which, as far as the program's text says ({held.peak_bytes / memory.total_bytes:.0%} of the peak)"


def buffer_lines(largest: Sequence[Large]) -> list[str]:
    if not largest:
        return []
    found = ["  largest buffers"]
    for item in largest[:_LISTED]:
        where = " ".join(word for word in (item.region, item.which) if word)
        named = ", ".join(word for word in (item.part, where) if word)
        found.append(f"    {format_bytes(item.bytes):>10}  {item.shape}  {named}: {_end(item.operation)}")
    return found


def _end(operation: str, most: int = 60) -> str:
    return operation if len(operation) <= most else f"...{operation[3 - most :]}"


def verdict(total: int, hbm_bytes: int, problem: str) -> str:
    """Whether a program fits, in words. Where it cannot run (`problem`) the compiler's word stands, whose measure is up
    to 1% above ours; where it can, ours never says the contrary.

    >>> verdict(2**34 - 2**20, 2**34, "the program does not fit: ..."), verdict(2**34 + 2**20, 2**34, "")
    ('does not fit into 16.0 GiB, by the compiler', 'fits into 16.0 GiB, 0 B are free')
    """
    if not problem:
        return fit(min(total, hbm_bytes), hbm_bytes)
    return (
        fit(total, hbm_bytes) if total > hbm_bytes else f"does not fit into {format_bytes(hbm_bytes)}, by the compiler"
    )


def fit(total: int, hbm_bytes: int) -> str:
    """
    >>> fit(2**30, 2**34), fit(2**34 + 2**30, 2**34)
    ('fits into 16.0 GiB, 15.0 GiB are free', 'does not fit into 16.0 GiB, by 1.00 GiB')
    """
    left = hbm_bytes - total
    if left >= 0:
        return f"fits into {format_bytes(hbm_bytes)}, {format_bytes(left)} are free"
    return f"does not fit into {format_bytes(hbm_bytes)}, by {format_bytes(-left)}"


def _bytes(size: int) -> str:
    return f"{format_bytes(size):>10} {size:>18,}"
