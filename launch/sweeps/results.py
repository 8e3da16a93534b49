"""What came of a sweep: a table of its members, best first, as Markdown, JSON and CSV, and over seeds."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.sweeps import outcomes
from launch.sweeps import points as combining
from launch.sweeps.index import DONE, FAILED, Decision, Entry, Index
from launch.sweeps.outcomes import Outcome
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.storage import paths

# What is judged where nothing is said: the first that a run reports.
_HELD_OUT = ("eval/validation/loss", "eval/validation/reward")
_OF_TRAINING = ("train/reward", "train/loss")  # a loss of answers that a policy drew itself says nothing of it
_HIGH = (
    "accuracy",
    "margin",
    "mfu",
    "model_flops_per_second",
    "reward",
    "teacher_agreement",
    "tokens_per_second",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """A member as the table shows it. last: the newest value of the metric; best: its best one, at step best_step."""

    entry: Entry
    step: int
    last: float | None
    best: float | None
    best_step: int | None
    state: str
    problem: str = ""  # why its files cannot be read


@dataclasses.dataclass(frozen=True)
class Table:
    """results: best first by `last`, those without a value at the end. fields: the paths that differ, in order."""

    metric: str
    goal: str
    fields: tuple[str, ...]
    results: tuple[Result, ...]
    decisions: tuple[Decision, ...]


def goal_of(metric: str) -> str:
    """Whether less or more of a metric is better, by its name.

    >>> goal_of("eval/validation/loss"), goal_of("eval/validation/accuracy")
    ('min', 'max')
    """
    last = metric.rpartition("/")[2]
    return "max" if last in _HIGH or "/reward" in metric else "min"


def metric_of(index: Index, found: Mapping[str, Outcome], asked: str) -> str:
    """The metric that the sweep is judged by. UsageError, with a member, where no run reports it."""
    reported = {name for outcome in found.values() for name in outcome.curves}
    if asked:
        if reported and asked not in reported:
            first = next(name for name, outcome in found.items() if outcome.curves)
            known = nearest(asked, found[first].curves)
            raise UsageError(f"--metric={asked} is reported by no run; of the member {first}: {known}")
        return asked
    held_out = sorted(name for name in reported if name.startswith("eval/") and name.endswith("/loss"))
    usual = (*_HELD_OUT, *held_out, *_OF_TRAINING)
    return next((name for name in usual if name in reported), usual[0])


def table(index: Index, found: Mapping[str, Outcome], *, metric: str = "", goal: str = "") -> Table:
    """The results of all members; `found` by name."""
    metric = metric_of(index, found, metric or index.settings.metric)
    goal = goal or index.settings.goal or goal_of(metric)
    fields = tuple(dict.fromkeys(path for entry in index for path in entry.member.point))
    results = []
    for entry in index:
        outcome = found[entry.name]
        best = outcome.best(metric, goal)
        ended = outcome.finished is not None and outcome.finished >= entry.steps > 0
        state = DONE if ended else entry.state
        results.append(
            Result(entry, outcome.step, outcome.last(metric), *(best or (None, None)), state, outcome.problem)
        )
    results.sort(key=lambda result: rank(result.last, goal))
    return Table(metric, goal, fields, tuple(results), tuple(index.decisions))


def rank(value: float | None, goal: str) -> tuple[bool, float]:
    """Sorts the best first, and what is no number last."""
    if value is None or not math.isfinite(value):
        return True, 0.0
    return False, value if goal == "min" else -value


def markdown(found: Table, title: str) -> str:
    short = _short(found.fields)
    head = ["", "member", *short.values(), "last", "best", "at step", "steps", "seconds", "state"]
    rows = []
    for place, result in enumerate(found.results, 1):
        entry = result.entry
        state = result.state if entry.status in (None, 0, 75) else f"{result.state} ({entry.status})"
        values = [_shown(entry.member.point[path]) if path in entry.member.point else "" for path in found.fields]
        rows.append(
            [str(place) if result.last is not None else "", entry.name, *values, _number(result.last)]
            + [_number(result.best), _shown(result.best_step), f"{result.step}/{entry.steps}"]
            + [f"{entry.seconds:.0f}", state]
        )
    which = "lowest" if found.goal == "min" else "highest"
    lines = [f"# {title}", "", f"By `{found.metric}`, the {which} first; `last` is its newest value.", ""]
    lines += _grid(head, rows)
    lines += ["", *_over_seeds(found, short)] if combining.SEED in found.fields and len(found.fields) > 1 else []
    lines += ["", *_decided(found.decisions)] if found.decisions else []
    failed = [result for result in found.results if result.problem or result.entry.state == FAILED]
    said = [f"- {result.entry.name}: {result.problem or result.entry.said}" for result in failed]
    lines += ["", "## Failed", "", *said] if said else []
    return "\n".join(lines) + "\n"


def records(found: Table) -> list[dict[str, Any]]:
    """One dict a member, for JSON and CSV."""
    return [
        {
            "member": result.entry.name,
            **{path: result.entry.member.point.get(path) for path in found.fields},
            "metric": found.metric,
            "last": _finite(result.last),
            "best": result.best,
            "best_step": result.best_step,
            "step": result.step,
            "steps": result.entry.steps,
            "seconds": round(result.entry.seconds, 1),
            "starts": result.entry.starts,
            "state": result.state,
            "said": result.entry.said,
        }
        for result in found.results
    ]


def write(found: Table, folder: str) -> None:
    """results.md, results.json and results.csv of a sweep's folder."""
    paths.write_text_atomic(paths.join(folder, "results.md"), markdown(found, paths.base_name(folder)))
    rows = records(found)
    paths.write_json_atomic(paths.join(folder, "results.json"), {"format": 1, "metric": found.metric, "members": rows})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths.write_text_atomic(paths.join(folder, "results.csv"), text.getvalue())


def outcomes_of(index: Index) -> dict[str, Outcome]:
    return {entry.name: outcomes.read(index.workdir(entry.name)) for entry in index}


def _short(fields: Sequence[str]) -> dict[str, str]:
    """By path a short title: its last part, or all of it where two have the same."""
    last = [path.rpartition(".")[2] for path in fields]
    return {
        path: path.removeprefix("config.") if last.count(name) > 1 else name
        for path, name in zip(fields, last, strict=True)
    }


def _over_seeds(found: Table, short: Mapping[str, str]) -> list[str]:
    """A table of the points without their seeds: mean and standard deviation of the last values."""
    groups: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for result in found.results:
        point = {path: value for path, value in result.entry.member.point.items() if path != combining.SEED}
        values = groups.setdefault(combining.key(point), (point, []))[1]
        if result.last is not None and math.isfinite(result.last):
            values.append(result.last)
    judged = [(point, values) for point, values in groups.values() if values]
    judged.sort(key=lambda pair: rank(statistics.fmean(pair[1]), found.goal))
    titles = {path: title for path, title in short.items() if path != combining.SEED}
    rows = [
        [_shown(point.get(path, "")) for path in titles]
        + [_number(statistics.fmean(values)), _number(statistics.stdev(values)) if len(values) > 1 else ""]
        + [str(len(values))]
        for point, values in judged
    ]
    head = [*titles.values(), "mean", "standard deviation", "seeds"]
    return ["## Over seeds", "", *_grid(head, rows)]


def _decided(decisions: Sequence[Decision]) -> list[str]:
    lines = ["## Early stops", ""]
    for decision in decisions:
        values = ", ".join(f"{name} {_number(value)}" for name, value in decision.ranking)
        lines.append(
            f"- After {decision.steps} steps, by `{decision.metric}`: {len(decision.promoted)} of "
            f"{len(decision.ranking)} go on ({', '.join(decision.promoted)}). Ranking: {values}."
        )
    return lines


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
