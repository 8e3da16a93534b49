"""Pictures of a sweep: all curves of its metric in one, and the metric against each field that differs, one a field."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch.sweeps.outcomes import Outcome
from launch.sweeps.results import Result, Table

_LOSS = "train/loss"
_NAMED = 10  # curves that the legend names: the best ones
_LOG_SPAN = 20  # the ratio of positive values from which an axis is logarithmic
_MAX_POINTS = 2000  # of a curve


def images(table: Table, found: Mapping[str, Outcome]) -> dict[str, bytes]:
    """{file name: PNG}; none where no member has a value of the metric."""
    judged = [result for result in table.results if result.last is not None and math.isfinite(result.last)]
    if not judged:
        return {}
    drawn = {"curves.png": _curves(table, judged, found)}
    for path in table.fields:
        if len({repr(result.entry.member.point.get(path)) for result in judged}) > 1:
            drawn[f"{re.sub(r'[^A-Za-z0-9_]+', '_', path.removeprefix('config.'))}.png"] = _field(table, judged, path)
    return drawn


def _curves(table: Table, judged: Sequence[Result], found: Mapping[str, Outcome]) -> bytes:
    """The metric, and the training loss beside it: an evaluation is made now and then only."""
    metrics = [table.metric]
    if table.metric != _LOSS and any(_LOSS in found[result.entry.name].curves for result in judged):
        metrics.append(_LOSS)
    figure, panels = _figure(len(metrics))
    colors = _colors(len(judged))
    for axes, metric in zip(panels, metrics, strict=True):
        shown: list[float] = []
        for place in reversed(range(len(judged))):  # the best on top
            name = judged[place].entry.name
            steps, values = found[name].curves.get(metric, ([], []))
            stride = max(1, len(steps) // _MAX_POINTS)
            style = {"color": colors[place], "linewidth": 1.2, "marker": "." if len(steps) <= 30 else ""}
            label = f"{name}: {judged[place].last:.4g}" if place < _NAMED else None
            axes.plot(steps[::stride], values[::stride], label=label, **style)
            shown += values
        axes.set_xlabel("step")
        axes.set_ylabel(metric)
        axes.set_ylim(*_range(shown, table.goal if metric == table.metric else "min"))
    handles, labels = panels[0].get_legend_handles_labels()
    title = f"{table.metric}, best first"
    panels[0].legend(handles[::-1], labels[::-1], fontsize="small", title=title, title_fontsize="small")
    return _png(figure)


def _field(table: Table, judged: Sequence[Result], path: str) -> bytes:
    """Each member a dot, colored as its curve; a line through the means of equal values."""
    figure, [axes] = _figure(1)
    points: list[tuple[Any, float, int]] = [
        (result.entry.member.point.get(path), math.nan if result.last is None else result.last, place)
        for place, result in enumerate(judged)
    ]
    kinds = {repr(value): value for value, _, _ in points}
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in kinds.values())
    if numbers:
        where = {text: float(value or 0) for text, value in kinds.items()}
        positive = sorted(where.values())
        if positive[0] > 0 and positive[-1] / positive[0] >= _LOG_SPAN:
            axes.set_xscale("log")
    else:
        where = {text: float(place) for place, text in enumerate(sorted(kinds))}
        axes.set_xticks(list(where.values()), ["-" if kinds[text] is None else str(kinds[text]) for text in where])
    colors = _colors(len(judged))
    for value, last, place in points:
        axes.plot(where[repr(value)], last, "o", color=colors[place])
    groups: dict[float, list[float]] = {}
    for value, last, _ in points:
        groups.setdefault(where[repr(value)], []).append(last)
    means = sorted((place, sum(group) / len(group)) for place, group in groups.items())
    if numbers and len(means) < len(points):
        axes.plot([place for place, _ in means], [mean for _, mean in means], color="0.6", linewidth=1, zorder=0)
    axes.set_xlabel(path)
    axes.set_ylabel(table.metric)
    axes.set_ylim(*_range([last for _, last, _ in points], table.goal))
    return _png(figure)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    # Imported here: it takes most of a second. Not pyplot, which holds state and picks a backend with windows.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 5 * panels, 5), layout="constrained")
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.grid(alpha=0.3)
    return figure, found


def _colors(count: int) -> list[Any]:
    """From the best to the worst."""
    from matplotlib import colormaps

    return [colormaps["viridis"](place / max(1, count - 1) * 0.9) for place in range(count)]


def _range(values: Sequence[float], goal: str) -> tuple[float | None, float | None]:
    """Limits that a member that diverged does not set: what is far worse than nine of ten values is cut off."""
    sign = 1 if goal == "min" else -1
    finite = sorted(sign * value for value in values if math.isfinite(value))
    if len(finite) < 3:
        return None, None
    best, late, worst = finite[0], finite[int(0.9 * (len(finite) - 1))], finite[-1]
    worst = min(worst, late + 3 * (late - best)) if late > best else worst
    margin = 0.05 * (worst - best) or 0.1
    low, high = sorted((sign * (best - margin), sign * (worst + margin)))
    return low, high


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
