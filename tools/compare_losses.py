"""Shows that a refactor changes no loss: the rows of two runs beside each other, exit status 1 if they differ.

    python tools/compare_losses.py RUN_A RUN_B                    two workdirs that exist
    python tools/compare_losses.py --base=HEAD [--steps=20]       trains the tiny config at a git revision and in
                                                                  the working tree, and compares these
    ... --config=configs/pretrain/small.py:/FOLDER --override=optim.schedule.warmup_steps=5

`--override=FIELD=VALUE` sets a field of the config in both; repeat it. FOLDER is absolute: both run in their own tree.

It does not judge whether a difference is good; `--tolerance` (relative) is 0 unless given.
"""

import argparse
import math
import os
import pathlib
import subprocess
import sys
import tempfile

from t5x_like.core.metrics import read_rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPARED = ("train/loss", "train/grad_norm")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=pathlib.Path, help="two workdirs")
    parser.add_argument("--base", help="git revision to train beside the working tree")
    parser.add_argument("--config", default="configs/pretrain/test.py", help="config to train (with --base)")
    parser.add_argument("--steps", type=int, default=20, help="updates to train (with --base)")
    parser.add_argument("--override", action="append", default=[], help="FIELD=VALUE of the config (with --base)")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest relative difference that passes")
    options = parser.parse_args(arguments)
    if bool(options.base) == bool(options.runs) or len(options.runs) not in (0, 2):
        parser.error("give either two workdirs or --base=REVISION")
    if options.runs:
        return compare(*(read(run) for run in options.runs), options.tolerance)
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder, "base")
        subprocess.run(["git", "worktree", "add", "--detach", base, options.base], cwd=ROOT, check=True)
        try:
            rows = [
                train(tree, pathlib.Path(folder, name), options.config, options.steps, options.override)
                for tree, name in ((base, "run_base"), (ROOT, "run_here"))
            ]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", base], cwd=ROOT, check=True)
    return compare(*rows, options.tolerance)


def train(
    source: pathlib.Path, workdir: pathlib.Path, config: str, steps: int, overrides: list[str]
) -> dict[int, dict[str, float]]:
    command = [sys.executable, "-m", "t5x_like", "train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.loop.steps={steps}", "--config.loop.log_every_steps=1"]
    command += [f"--config.{override}" for override in overrides]
    environment = os.environ | {"PYTHONPATH": str(source)}
    subprocess.run(command, cwd=source, env=environment, check=True, stdout=subprocess.DEVNULL)
    return read(workdir)


def read(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """{step: {name: value}} of the training rows of a workdir. Exits with 2 if it has none."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        print(f"compare_losses: {path}: no such file; give a workdir that was trained in", file=sys.stderr)
        sys.exit(2)
    return {row["step"]: row for row in read_rows(str(path)) if COMPARED[0] in row}


def compare(one: dict[int, dict[str, float]], two: dict[int, dict[str, float]], tolerance: float) -> int:
    steps = sorted(one.keys() & two.keys())
    if not steps or one.keys() != two.keys():
        print(f"the runs have rows for other steps: {len(one)} and {len(two)} rows, {len(steps)} in common")
        return 1
    worst, differing = 0.0, []
    for step in steps:
        differences = [_relative(one[step][name], two[step][name]) for name in COMPARED]
        worst = max(worst, *differences)
        differing += [step] if max(differences) > tolerance else []
        mark = "  DIFFERS" if step in differing else ""
        print(f"{step:>6}  {one[step]['train/loss']!r:<22} {two[step]['train/loss']!r:<22}{mark}")
    first = f"; step {differing[0]} is the first that differs" if differing else ""
    print(f"{len(steps)} rows, largest relative difference {worst:g}, allowed {tolerance:g}{first}")
    return 1 if differing else 0


def _relative(one: float, two: float) -> float:
    """0 for equal values, NaN with NaN included; infinite where only one of them is finite."""
    if one == two or math.isnan(one) and math.isnan(two):
        return 0.0
    difference = abs(one - two) / max(abs(one), abs(two))
    return difference if math.isfinite(difference) else math.inf


if __name__ == "__main__":
    sys.exit(main())
