"""The rows as a table: published beside estimated, with the error of each, none left out."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from tools.calibrate import constants, fit, published
from tools.calibrate.applying import Applied
from tools.calibrate.rows import Row


@dataclasses.dataclass(frozen=True)
class Timed:
    """Rows with the programs planned for each. A row of two programs is estimated by the middle of their range."""

    rows: Sequence[Row]
    programs: Sequence[Sequence[Applied]]

    @property
    def published(self) -> list[float]:
        return [published.step_seconds(row) for row in self.rows]

    def ends(self, row: int) -> list[float]:
        """Estimates of a row's programs by the constants in force."""
        return sorted(each.estimate().step_seconds for each in self.programs[row])

    def seconds(self, row: int, values: Mapping[str, float]) -> float:
        with constants.using(values):
            return statistics.fmean(self.ends(row))


def fitted(timed: Timed) -> str:
    """Constants fitted to all rows beside those in force, and the errors that either give."""
    best = fit.fit(constants.CONSTANTS, timed.published, timed.seconds)
    in_force = constants.in_force()
    lines = [f"{name:14} fitted {best[name]:.3f}   in force {in_force[name]:.3f}" for name in best]
    for name, values in (("fitted", best), ("in force", in_force)):
        lines.append(f"{name}: {summary(fit.errors(timed.published, timed.seconds, values))}")
    return "\n".join(lines)


def summary(errors: Sequence[float]) -> str:
    """The median and the largest of errors, without their signs.

    >>> summary([0.1, -0.2, 0.05])
    'median error 10%, largest 20%'
    """
    sizes = [abs(error) for error in errors]
    return f"median error {statistics.median(sizes):.0%}, largest {max(sizes):.0%}"


HEADER = (
    "row",
    "remat as published",
    "step s",
    "estimated",
    "error",
    "left out",
    "MFU",
    "estimated",
    "compute",
    "kernels",
    "waiting",
    "exposed",
)


def to_markdown(timed: Timed, *, missing: Sequence[Row] = ()) -> str:
    """The table of docs/planner.md. left out: the error by constants that are fitted to the other rows. MFU counts full
    attention; seconds of the three parts, and what the schedule leaves exposed, are those of the first program."""
    left_out = fit.leave_one_out(constants.CONSTANTS, timed.published, timed.seconds)
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    errors = []
    for number, (row, time) in enumerate(zip(timed.rows, timed.published, strict=True)):
        ends = timed.ends(number)
        seconds = statistics.fmean(ends)
        errors.append(seconds / time - 1)
        first = timed.programs[number][0].estimate()
        parts, exposed = first.parts, sum(first.exposed.values())
        waiting = sum(parts[name] for name in first.exposed)
        lines.append(
            _line(
                (
                    row.name,
                    row.remat,
                    f"{time:.4g}",
                    " to ".join(f"{end:.4g}" for end in ends),
                    f"{errors[-1]:+.0%}",
                    f"{left_out[number]:+.0%}",
                    f"{published.mfu(row, time):.1%}",
                    f"{published.mfu(row, seconds):.1%}",
                    f"{parts['compute']:.4g}",
                    f"{parts['kernels']:.3g}",
                    f"{waiting:.3g}",
                    f"{exposed:.3g}",
                )
            )
        )
    lines += [_line([row.name, row.remat, f"{published.step_seconds(row):.4g}", "not planned"]) for row in missing]
    lines += ["", f"In force: {summary(errors)}; each row left out of the fit in turn: {summary(left_out)}."]
    return "\n".join([*lines, "", compiled_at(timed)])


def compiled_at(timed: Timed) -> str:
    """Which step the programs are of: kept ones stay while the step changes."""
    commits: dict[str, list[str]] = {}
    for program in (each for programs in timed.programs for each in programs):
        commits.setdefault(program.commit, []).append(program.program.name)
    each = (f"{commit} ({', '.join(dict.fromkeys(names))})" for commit, names in sorted(commits.items()))
    return f"Compiled at {'; '.join(each)}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
