"""One evaluation as JSON, to be read again, and as Markdown, to be read: models side by side, differences paired.

JSON has no NaN and no infinities: they are the texts "NaN", "Infinity" and "-Infinity", as in metrics.jsonl.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.core.metrics import NON_FINITE, to_json
from t5x_like.evaluation.results import Evaluation, Metric
from t5x_like.evaluation.statistics import Difference, mean
from t5x_like.storage import paths

FORMAT = 1
_STORED = ("task", "name", "filter", "value", "error", "higher_is_better", "items", "documents")


@dataclasses.dataclass(frozen=True)
class Report:
    """facts: what was asked for, versions and dates. differences: of each model but the first from the first."""

    facts: Mapping[str, Any]
    evaluations: Sequence[Evaluation]
    differences: Mapping[str, Sequence[Difference]]

    def to_json(self) -> dict[str, Any]:
        models = [
            {
                "model": evaluation.model,
                "metrics": [{name: getattr(metric, name) for name in _STORED} for metric in evaluation.metrics],
                "shots": evaluation.shots,
                "truncated": evaluation.truncated,
            }
            for evaluation in self.evaluations
        ]
        differences = {name: [dataclasses.asdict(each) for each in found] for name, found in self.differences.items()}
        return _plain({"format": FORMAT, "facts": dict(self.facts), "models": models, "differences": differences})

    def without_number(self) -> list[str]:
        """A line for each metric whose value is NaN or infinite."""
        return [
            f"{evaluation.model}: {metric.task} {metric.name} is {metric.value}, no finite number"
            for evaluation in self.evaluations
            for metric in evaluation.metrics
            if not math.isfinite(metric.value)
        ]

    def to_markdown(self) -> str:
        names = [evaluation.model for evaluation in self.evaluations]
        head = ["task", "metric", "n", *names, *(f"{name} - {names[0]}" for name in names[1:])]
        lines = ["# Evaluation", "", _row(head), _row(["---"] * 3 + ["---:"] * (len(head) - 3))]
        lines += [_row(self._cells(key)) for key in dict.fromkeys(m.key for e in self.evaluations for m in e.metrics)]
        lines += ["", "Values with one standard error. Differences are paired, document by document."]
        cut = [f"{e.model}: {e.truncated}" for e in self.evaluations if e.truncated]
        if cut:
            lines.append(f"Requests whose beginning did not fit the model: {', '.join(cut)}.")
        lines += ["", *(f"- {name}: {value}" for name, value in self.facts.items())]
        return "\n".join(lines) + "\n"

    def _cells(self, key: tuple[str, str, str]) -> list[str]:
        found = [next((m for m in e.metrics if m.key == key), None) for e in self.evaluations]
        task, metric, cleaned = key
        direction = next((m.higher_is_better for m in found if m is not None), None)
        arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}[direction]
        count = max((len(m.items) for m in found if m is not None), default=0)
        label = metric + ("" if cleaned == "none" else f", {cleaned}") + arrow
        cells = [task, label, str(count or ""), *("" if m is None else with_error(m.value, m.error) for m in found)]
        for evaluation in self.evaluations[1:]:
            pairs = self.differences.get(evaluation.model, ())
            pair = next((d for d in pairs if (d.task, d.name, d.filter) == key), None)
            cells.append("" if pair is None else with_error(pair.value, pair.error, sign=True))
        return cells


def with_error(value: float, error: float | None, *, sign: bool = False) -> str:
    text = f"{value:+.4f}" if sign else f"{value:.4f}"
    return text if error is None else f"{text} +- {error:.4f}"


def write(report: Report, output: str, *, samples: bool) -> None:
    """report.json and report.md in the folder `output`; with samples also samples/MODEL/TASK.jsonl."""
    paths.make_directory(output)
    paths.write_json_atomic(paths.join(output, "report.json"), report.to_json())
    paths.write_bytes_atomic(paths.join(output, "report.md"), report.to_markdown().encode())
    if not samples:
        return
    for evaluation in report.evaluations:
        name = evaluation.model.strip("/").replace("%", "%25").replace("_", "%5F").replace("/", "_")
        folder = paths.join(output, "samples", name)  # no two models share one
        paths.make_directory(folder)
        for task, found in evaluation.samples.items():
            lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in found)
            paths.write_bytes_atomic(paths.join(folder, f"{task}.jsonl"), lines.encode())


def read(path: str) -> Evaluation:
    """The last model of a report.json. Its metrics have no aggregates of their own: the other side of a pair has."""
    try:
        content = json.loads(paths.read_bytes(path))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this program reads {FORMAT}")
        found = content["models"][-1]
        return Evaluation(path, tuple(_metric(each) for each in found["metrics"]), found["shots"], 0, {})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no report of `t5x_like evaluate` ({type(error).__name__}: {error}); give its report.json"
        ) from None


def facts(path: str) -> dict[str, Any]:
    """What a report.json, which `read` reads, was asked for."""
    return dict(json.loads(paths.read_bytes(path)).get("facts", {}))


def _metric(stored: Mapping[str, Any]) -> Metric:
    fields: dict[str, Any] = {name: stored[name] for name in _STORED}
    fields |= {name: _number(fields[name]) for name in ("value", "error")}
    fields["items"] = tuple(_number(_tuples(item)) for item in fields["items"])
    fields["documents"] = tuple(fields["documents"])
    return Metric(**fields, aggregate=mean)


def _tuples(item: Any) -> Any:
    """An item; where it holds numbers, a text that stands for one is one too."""
    if not isinstance(item, list):
        return item
    numbers = any(isinstance(each, float | int) for each in item)
    return tuple(_number(each) if numbers else _tuples(each) for each in item)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in NON_FINITE else value


def _plain(value: Any) -> Any:
    """Of lists, tuples and dicts, with numbers that JSON has."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else to_json(value)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
