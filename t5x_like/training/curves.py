"""loss.png from metrics.jsonl: training and held-out loss, bits per byte, learning rate. Draws; computes nothing.

python -m t5x_like.training.curves DIR/metrics.jsonl DIR/loss.png
"""

import os
import sys
from typing import Any

from t5x_like.core.metrics import read_rows

MAX_POINTS = 4000  # a curve: more would not be seen and take seconds to draw


def read_curves(metrics: str) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (steps, values)} of every metric in the file."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_rows(metrics):
        for name, value in row.items():
            if name not in ("step", "time"):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return curves


def draw(metrics: str, image: str) -> bool:
    """Draws `image` (a .png, whole or not at all) from the rows of `metrics`; False where there is no loss yet."""
    curves = read_curves(metrics)
    held_out = {name.split("/")[1]: name for name in curves if name.startswith("eval/") and name.endswith("/loss")}
    if "train/loss" not in curves and not held_out:
        return False
    # Imported here: it takes most of a second. Not pyplot, which holds state and picks a backend with windows.
    from matplotlib.figure import Figure

    bytes_known = [name for name in curves if name.startswith("eval/") and name.endswith("/bits_per_byte")]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2 if bytes_known else 1, squeeze=False)[0]
    if "train/loss" in curves:
        _plot(axes[0], curves["train/loss"], label="training", color="0.7", linewidth=0.8)
    for name, path in sorted(held_out.items()):
        _plot(axes[0], curves[path], label=name, marker=".")
    _name(axes[0], "loss (nats a token)")
    axes[0].set_ylim(*_range(curves, ["train/loss", *held_out.values()]))
    if "train/learning_rate" in curves:
        rate = axes[0].twinx()
        _plot(rate, curves["train/learning_rate"], color="tab:green", linewidth=0.8, linestyle=":")
        rate.set_ylabel("learning rate (dotted)")
        rate.set_ylim(bottom=0)
    for path in sorted(bytes_known):
        _plot(axes[-1], curves[path], label=f"{path.split('/')[1]}: last {curves[path][1][-1]:.4f}", marker=".")
        _name(axes[-1], "held-out bits per byte")
    temporary = f"{image}.tmp"
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, image)
    return True


def _plot(axes: Any, curve: tuple[list[int], list[float]], **style: Any) -> None:
    steps, values = curve
    stride = max(1, len(steps) // MAX_POINTS)
    axes.plot(steps[::stride], values[::stride], **style)


def _name(axes: Any, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def _range(curves: dict[str, tuple[list[int], list[float]]], names: list[str]) -> tuple[float | None, float | None]:
    """Limits that a few wild first losses do not set: 99 of 100 values are inside."""
    values = sorted(value for name in names if name in curves for value in curves[name][1] if abs(value) < 1e6)
    if len(values) < 2 or values[0] == values[-1]:
        return None, None
    low, high = values[0], values[min(len(values) - 1, int(len(values) * 0.99))]
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m t5x_like.training.curves METRICS.jsonl IMAGE.png")
    sys.exit(0 if draw(sys.argv[1], sys.argv[2]) else "no loss in that file yet")
