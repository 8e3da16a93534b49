"""A budget as text for people and as JSON for programs. It formats; formulas stand in budget.py."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.terminal import format_bytes, format_count
from t5x_like.planner.sizes import budget
from t5x_like.planner.sizes.budget import FITS, Choice, Fit
from t5x_like.planner.sizes.footprint import Footprint


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of a family. choice: by each fit, in the order of budget.FITS. state_bytes: over all devices."""

    name: str
    fields: Mapping[str, Any]
    choices: tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory by part under each remat policy. devices: how many; hbm_bytes: of a device, None where none is named."""

    mesh: Mapping[str, int]
    devices: int
    hbm_bytes: int | None
    batch: str
    by_remat: Mapping[str, Footprint]
    chosen: str


@dataclasses.dataclass(frozen=True)
class Run:
    """What the compute is spent on: overrides that `plan` and `train` accept, and what they come to."""

    flags: Sequence[str]
    facts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Budget:
    """flops: of training. origin: where they come from, in words. given: a model that was asked about, by each fit.
    served: tokens of inference over its life, 0 for unknown."""

    flops: float
    origin: str
    given: tuple[Choice, ...] = ()
    served: float = 0.0
    family: str = ""
    rows: Sequence[Row] = ()
    memory: Memory | None = None
    run: Run | None = None


def to_text(found: Budget) -> str:
    lines = [
        f"training compute: {found.flops:.3g} FLOPs, {found.origin}",
        "Estimates by published fits, loss(N, D) = E + A/N^alpha + B/D^beta with 6 N D FLOPs; losses are of their "
        "data, in nats a token.",
        *(f"  {fit.name}: {fit.source}" for fit in FITS),
        "",
        *_optimum(found),
        *(_given(found) if found.given else []),
        "",
        *_trade_off(found),
        *(_lifetime(found) if found.served else []),
        *(_family(found) if found.rows else []),
        *(_memory(found.memory) if found.memory else []),
        *(_run(found.run) if found.run else []),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *rest in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _cells(choice: Choice) -> list[str]:
    return [
        format_count(choice.parameters),
        format_count(choice.tokens),
        format_count(choice.ratio),
        f"{choice.loss:.3f}",
    ]


def _optimum(found: Budget) -> list[str]:
    best = [fit.of_flops(found.flops) for fit in FITS]
    header = ["best at this compute", "parameters", "tokens", "tokens/parameter", "loss"]
    rows = [[f"  {fit.name}", *_cells(choice)] for fit, choice in zip(FITS, best, strict=True)]
    parameters, tokens = (budget.spread([getattr(each, name) for each in best]) for name in ("parameters", "tokens"))
    low, high = budget.FITTED
    beyond = (
        [] if low <= found.flops <= high else [f"  extrapolated: the runs behind them had {low:g} to {high:g} FLOPs"]
    )
    return [
        *_table(header, rows),
        f"  the two are {parameters:.2f}x apart in parameters and {tokens:.2f}x in tokens",
        *beyond,
    ]


def _given(found: Budget) -> list[str]:
    rows, lines = [], []
    for fit, choice in zip(FITS, found.given, strict=True):
        best, own = fit.of_flops(choice.flops), fit.of_parameters(choice.parameters)
        rows.append([f"  {fit.name}", *_cells(choice)])
        lines.append(
            f"  {fit.name}: {choice.loss - best.loss:+.3f} nats beside the best at the same compute; "
            f"{choice.tokens / own.tokens:.3g}x the tokens that are best for this size"
        )
    return ["", *_table(["as asked", "parameters", "tokens", "tokens/parameter", "loss"], rows), *lines]


def _trade_off(found: Budget) -> list[str]:
    fit, other = FITS
    best = fit.of_flops(found.flops)
    header = ["smaller models", "parameters", "tokens", "loss", f"({other.name})", "tokens to the best loss", "FLOPs"]
    header.append("pays from, served")
    rows = []
    for each in budget.trade_off(fit, best):
        cells = _cells(each.at_compute)
        elsewhere = other.loss(each.at_compute.parameters, each.at_compute.tokens)
        equal = each.equal_loss
        rows.append(
            [
                f"  {each.share:.0%} of the best",
                *cells[:2],
                cells[3],
                f"{elsewhere:.3f}",
                "never" if equal is None else format_count(equal.tokens),
                "" if equal is None else f"{equal.flops / best.flops:.2f}x",
                "" if equal is None else f"{format_count(each.pays_from)} tokens",
            ]
        )
    return [
        f"over-training for inference, by {fit.name}: at the same compute, and until the best loss {best.loss:.3f}",
        *_table(header, rows),
    ]


def _lifetime(found: Budget) -> list[str]:
    header = ["training and serving", "parameters", "tokens", "FLOPs in all", "beside the best to train"]
    rows = []
    for fit in FITS:
        best = fit.of_flops(found.flops)
        choice = fit.for_lifetime(best.loss, found.served)
        spent, before = (budget.lifetime_flops(c.parameters, c.tokens, found.served) for c in (choice, best))
        rows.append(
            [
                f"  {fit.name}",
                format_count(choice.parameters),
                format_count(choice.tokens),
                f"{spent:.3g}",
                f"{spent / before - 1:+.1%}",
            ]
        )
    return [
        "",
        f"the least compute for the best loss with {format_count(found.served)} tokens served (arXiv 2401.00448; "
        "2 N FLOPs a served token)",
        *_table(header, rows),
    ]


def _family(found: Budget) -> list[str]:
    fit, other = FITS
    header = [f"{found.family} at this compute", "parameters", "tokens", "tokens/parameter", "loss", f"({other.name})"]
    rows = [[f"  {row.name}", *_cells(row.choices[0]), f"{row.choices[1].loss:.3f}"] for row in found.rows]
    return ["", *_table(header, rows), f"  tokens by the model's own FLOPs, attention included; loss by {fit.name}"]


def _memory(memory: Memory) -> list[str]:
    mesh = " ".join(f"{axis}={size}" for axis, size in memory.mesh.items() if size > 1) or "one device"
    parts = [field.name for field in dataclasses.fields(Footprint)]
    used = [part for part in parts if any(getattr(each, part) for each in memory.by_remat.values())]
    rows = [
        [
            f"  remat {remat}" + (" (this config)" if remat == memory.chosen else ""),
            *(format_bytes(getattr(each, part)) for part in used),
            format_bytes(each.total),
            "" if memory.hbm_bytes is None else "yes" if each.total <= memory.hbm_bytes else "no",
        ]
        for remat, each in memory.by_remat.items()
    ]
    limit = "" if memory.hbm_bytes is None else f"fits {format_bytes(memory.hbm_bytes)}"
    return [
        "",
        f"memory of a device before any compile: mesh {mesh}, {memory.batch}",
        *_table(["", *used, "total", limit], rows),
        "  state, gradients and saved activations are exact but for layouts; working is an estimate",
    ]


def _run(run: Run) -> list[str]:
    return [
        "",
        "a run with this budget",
        *(f"  {name:<12} {value}" for name, value in run.facts.items()),
        "  try it: t5x_like plan --config=pretrain/llama3_8b " + " ".join(run.flags),
    ]


def to_json(found: Budget) -> dict[str, Any]:
    """The content of `plan --budget --json`. Later versions add keys."""
    fits = []
    for number, fit in enumerate(FITS):
        best = fit.of_flops(found.flops)
        entry: dict[str, Any] = {
            **dataclasses.asdict(fit),
            "best": _choice(best),
            "trade_off": [
                {
                    "share": each.share,
                    "at_compute": _choice(each.at_compute),
                    "equal_loss": None if each.equal_loss is None else _choice(each.equal_loss),
                    "pays_from_tokens": None if math.isinf(each.pays_from) else each.pays_from,
                }
                for each in budget.trade_off(fit, best)
            ],
        }
        if found.given:
            entry["given"] = _choice(found.given[number])
        if found.served:
            lifetime = fit.for_lifetime(best.loss, found.served)
            spent = budget.lifetime_flops(lifetime.parameters, lifetime.tokens, found.served)
            entry["lifetime"] = {**_choice(lifetime), "lifetime_flops": spent}
        entry["sizes"] = [{"name": row.name, **row.fields, **_choice(row.choices[number])} for row in found.rows]
        fits.append(entry)
    memory = found.memory
    return {
        "estimate": True,
        "flops": found.flops,
        "origin": found.origin,
        "served_tokens": found.served,
        "fits": fits,
        "memory": None
        if memory is None
        else {
            "mesh": dict(memory.mesh),
            "devices": memory.devices,
            "hbm_bytes": memory.hbm_bytes,
            "remat": memory.chosen,
            "by_remat": {remat: each.to_json() for remat, each in memory.by_remat.items()},
        },
        "run": None if found.run is None else {"flags": list(found.run.flags), **found.run.facts},
    }


def _choice(choice: Choice) -> dict[str, float]:
    return {**dataclasses.asdict(choice), "flops": choice.flops}


def choices(parameters: float, tokens: float) -> tuple[Choice, ...]:
    """A model and its tokens by each fit."""
    return tuple(fit.choice(parameters, tokens) for fit in FITS)


def first(fits: Sequence[Fit] = FITS) -> Fit:
    """The fit by which one size is chosen where one has to be."""
    return fits[0]
