"""What a run's workdir says of it, on a disk or in a bucket: how far it is, and its metrics."""

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping

from t5x_like.core.errors import UserError
from t5x_like.core.metrics import read_rows
from t5x_like.storage import manifest, paths

METRICS = "metrics.jsonl"

Curve = tuple[list[int], list[float]]  # steps and values


@dataclasses.dataclass(frozen=True)
class Outcome:
    """finished: the steps of a run that ended with all of them done, else None. step: that of its last row, or 0.

    problem: why its files cannot be read, in one line, or "".
    """

    finished: int | None
    step: int
    curves: Mapping[str, Curve]
    problem: str = ""

    def last(self, metric: str) -> float | None:
        """The newest value of a metric, None where there is none."""
        return self.curves[metric][1][-1] if metric in self.curves else None

    def at(self, metric: str, step: int) -> float | None:
        """The newest value at or before a step."""
        steps, values = self.curves.get(metric, ([], []))
        found = [value for place, value in zip(steps, values, strict=True) if place <= step]
        return found[-1] if found else None

    def best(self, metric: str, goal: str) -> tuple[float, int] | None:
        """(the lowest or highest finite value, its step), the earlier of equal ones."""
        steps, values = self.curves.get(metric, ([], []))
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        sign = 1 if goal == "min" else -1
        return min(finite, key=lambda pair: (sign * pair[0], pair[1]), default=None)


def read(workdir: str) -> Outcome:
    """What there is; a workdir that is not there yet has nothing, and a damaged one nothing but a problem."""
    root = paths.normal(workdir)
    try:
        return _read(root)
    except UserError as error:
        return Outcome(None, 0, {}, str(error))
    except (KeyError, TypeError, ValueError) as error:  # of a row that has no numbers
        return Outcome(None, 0, {}, f"{root} is damaged: {type(error).__name__} {error}")


def _read(root: str) -> Outcome:
    curves: dict[str, Curve] = {}
    step = 0
    path = paths.join(root, METRICS)
    if paths.exists(path):
        with tempfile.TemporaryDirectory(prefix="t5x_like-sweep-") as folder:
            if paths.is_remote(path):
                here = os.path.join(folder, METRICS)
                paths.copy_file(path, here)
                path = here
            for row in read_rows(path):
                step = row["step"]
                for name, value in row.items():
                    if name not in ("step", "time"):
                        steps, values = curves.setdefault(name, ([], []))
                        steps.append(step)
                        values.append(float(value))
    return Outcome(finished_step(root), step, curves)


def finished_step(workdir: str) -> int | None:
    """The steps of a run that ended with all of them done, else None. Raises UserError for a damaged manifest."""
    root = paths.normal(workdir)
    finished = manifest.read(root).get("finished")
    if not finished:
        return None
    try:
        return int(finished["step"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{root}: its manifest says finished: {finished!r}, without a step") from None
