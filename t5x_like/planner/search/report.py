"""A search as a table: the best points, and why each other was dropped. All figures are estimates."""

import collections
from collections.abc import Sequence

from t5x_like.core.terminal import format_bytes
from t5x_like.planner import report
from t5x_like.planner.search import index as search_index
from t5x_like.planner.search.course import ranking
from t5x_like.planner.search.index import Entry, Index

SHOWN = 10
_KINDS = {
    search_index.REFUSED: "do not fit, by the compiler",
    search_index.FAILED: "could not be judged",
    search_index.LARGE: "cannot fit, by the analytic model",
    search_index.ILLEGAL: "cannot run",
    search_index.OPEN: "were not judged",
}


def to_text(index: Index, hbm_bytes: int) -> str:
    """What the terminal shows: the best, and of each kind of dropped points how many and one example."""
    found = ranking(index)
    lines = [*head(index), "", *table(found[:SHOWN], hbm_bytes)]
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN} more")
    for state, kind in _KINDS.items():
        dropped = _dropped(index, state)
        if dropped:
            example = dropped[0]
            lines.append(f"{len(dropped):>6,} {kind}, such as {example.name}: {_why(example, _least(index))}")
    return "\n".join(line.rstrip() for line in lines)


def to_markdown(index: Index, hbm_bytes: int) -> str:
    """The whole: every point that fits, then every other one with its reason."""
    found, least = ranking(index), _least(index)
    lines = [*head(index), "", "```", *table(found, hbm_bytes), "```", "", "## Dropped", ""]
    for state, kind in _KINDS.items():
        dropped = _dropped(index, state)
        if dropped:
            lines += [f"### {len(dropped):,} {kind}", ""]
            lines += [f"- `{entry.name}`: {_why(entry, least)}" for entry in dropped]
            lines.append("")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def head(index: Index) -> list[str]:
    counts = collections.Counter(entry.state for entry in index)
    asked = sum(counts[state] for state in search_index.ASKED)
    settings = index.settings
    options = "with the compiler's default options" if settings["default_options"] else "as they would run"
    compiler = settings["versions"].get("libtpu", "?")
    return [
        f"search of {' '.join(settings['arguments'])} on {settings['topology']}: {len(index):,} points, {asked} judged",
        f"Estimates of the TPU compiler (libtpu {compiler}), {options}; nothing was run.",
    ]


def table(entries: Sequence[Entry], hbm_bytes: int) -> list[str]:
    """Best first. What was confirmed has `*` and the figures of its own compiler options."""
    if not entries:
        return ["no point fits"]
    best = entries[0].best
    assert best is not None
    rows = [{"point": "point", "step": "step", "to the best": "slower", "mfu": "MFU", "memory": "memory"}]
    rows[0]["bound"] = "bound by"
    for entry in entries:
        each = entry.best
        assert each is not None
        alike = (entry.confirmed is None) == (entries[0].confirmed is None)
        rows.append(
            {
                "point": f"  {entry.name}{' *' if entry.confirmed else ''}",
                "step": f"{each.seconds:.4g} s",
                "to the best": f"{each.seconds / best.seconds - 1:+.1%}" if alike and each is not best else "",
                "mfu": f"{each.mfu:.1%}",
                "memory": f"{format_bytes(each.bytes)} ({each.bytes / hbm_bytes:.0%})",
                "bound": each.bound_by,
            }
        )
    lines = report.table(rows, right=("step", "to the best", "mfu", "memory"))
    if any(entry.confirmed for entry in entries):
        lines.append("  * judged with the config's own compiler options")
    for entry in entries:
        if entry.unconfirmed:
            lines.append(f"  {entry.name} was not judged with the config's own compiler options: {entry.unconfirmed}")
    return lines


def _dropped(index: Index, state: str) -> list[Entry]:
    found = [entry for entry in index if entry.state == state]
    found += [entry for entry in index if state == search_index.REFUSED and entry.refused]
    return sorted(found, key=lambda entry: (entry.analytic.get("seconds", 0.0), entry.name))


def _least(index: Index) -> float | None:
    """The least analytic seconds of the points that were judged and fit."""
    return min((entry.analytic["seconds"] for entry in ranking(index) if entry.analytic), default=None)


def _why(entry: Entry, least: float | None) -> str:
    if entry.refused:
        return entry.refused
    if entry.said or entry.state != search_index.OPEN:
        return entry.said
    seconds = entry.analytic["seconds"]
    behind = f", {seconds / least - 1:+.1%} beside the best of those that were judged" if least else ""
    return f"about {seconds:.4g} s{behind}; --points=N judges more"
