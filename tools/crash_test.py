"""Kills a training run again and again, and shows that its result is that of an undisturbed run, bit for bit.

    python tools/crash_test.py                          20 SIGKILLs and 3 SIGTERMs, one process
    python tools/crash_test.py --processes=2 --devices=4     the same over two processes of 4 fake devices
    python tools/crash_test.py --rl                     of reinforcement learning, whose rollouts are pending at a save

Some kills fall anywhere (start, compilation, steps), some into the writing of a checkpoint. A SIGTERM has to end in
exit status 75 with a checkpoint of the step it stopped at. The account of where the time went (`inspect --goodput`) has
to add up and to count every step that was done again. Exit status 0 if all is equal, 1 if not.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from t5x_like.commands.inspect import spent
from t5x_like.core.metrics import is_measurement

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREEMPTED = 75
SAVE_EVERY = 4
MOMENTS = ("saving", "stepping", "saving", "stepping", "starting")


@dataclasses.dataclass(frozen=True)
class Settings:
    command: str
    config: str
    steps: int
    processes: int
    devices: int
    overrides: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Blow:
    """One interruption: what was sent when, where the run stood, and how it ended."""

    number: int
    sent: str
    moment: str
    row: int
    checkpoint: int
    unfinished: bool
    status: int
    wrong: str


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    chance = random.Random(options.seed)
    settings = Settings(
        command="rl" if options.rl else "train",
        config=options.config or ("configs/rl/test.py" if options.rl else "configs/pretrain/test.py"),
        steps=8 * (options.kills + options.stops) + 16,
        processes=options.processes,
        devices=options.devices,
        overrides=(*options.overrides, *(["--config.rl.epochs=3"] if options.rl else [])),
    )
    with tempfile.TemporaryDirectory(prefix="crash_test_") as temporary:
        folder = pathlib.Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        whole, broken = folder / "undisturbed", folder / "killed"
        print(f"undisturbed run of {settings.steps} steps ...", flush=True)
        start_seconds = _run_whole(settings, whole)
        begun = time.time()
        blows = _interrupt(settings, broken, options, chance, start_seconds)
        ended = time.time()
        problems = [f"interruption {blow.number}: {blow.wrong}" for blow in blows if blow.wrong]
        problems += compare_rows(whole / "metrics.jsonl", broken / "metrics.jsonl")
        problems += compare_checkpoints(whole / "checkpoints", broken / "checkpoints")
        problems += check_goodput(broken, blows, steps=settings.steps, begun=begun, ended=ended)
    _print(blows, problems, options)
    return 1 if problems else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs (20)")
    parser.add_argument("--stops", type=int, default=3, help="SIGTERMs (3)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (1)")
    parser.add_argument("--devices", type=int, default=0, help="fake CPU devices of each process")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--config", default="", help="what is trained (configs/pretrain/test.py, configs/rl/test.py)")
    parser.add_argument("--rl", action="store_true", help="runs `t5x_like rl`, 6 updates an iteration")
    parser.add_argument("--folder", help="keep the two workdirs here")
    parser.add_argument("overrides", nargs="*", help="further arguments of `train`, after --")
    return parser.parse_args(arguments)


# Running.


def _start(settings: Settings, workdir: pathlib.Path, output: Any) -> subprocess.Popen[bytes]:
    """Starts or resumes the run. A resume names the workdir alone, as a person would, and where functions of a config
    are needed its file."""
    command = [sys.executable, "-m"]
    if settings.processes > 1:
        command += ["launch.local", f"--processes={settings.processes}", f"--devices={settings.devices}", "--"]
    command = [*command, *(["t5x_like"] if settings.processes == 1 else []), settings.command, f"--workdir={workdir}"]
    if settings.command == "rl" or not (workdir / "config.json").exists():
        command += [f"--config={settings.config}", *_overrides(settings)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if settings.devices:
        environment["JAX_NUM_CPU_DEVICES"] = str(settings.devices)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _overrides(settings: Settings) -> list[str]:
    return [
        f"--config.loop.steps={settings.steps}",
        f"--config.checkpoint.every_steps={SAVE_EVERY}",
        f"--config.evaluate.every_steps={2 * SAVE_EVERY}",
        "--config.telemetry.tensorboard=False",  # its import takes longer than the run
        *settings.overrides,
    ]


def _run_whole(settings: Settings, workdir: pathlib.Path) -> float:
    """Runs undisturbed; seconds from the start to the first row of metrics."""
    begun = time.monotonic()
    first_row = 0.0
    with open(output_of(workdir), "wb") as output:
        child = _start(settings, workdir, output)
        while child.poll() is None:
            if not first_row and last_row(workdir):
                first_row = time.monotonic() - begun
            time.sleep(0.01)
    if child.returncode != 0:
        sys.exit(f"crash_test: the undisturbed run failed:\n{output_of(workdir).read_text()[-3000:]}")
    return first_row or time.monotonic() - begun


def _interrupt(
    settings: Settings, workdir: pathlib.Path, options: argparse.Namespace, chance: random.Random, start_seconds: float
) -> list[Blow]:
    """Starts the run and interrupts it until all interruptions are spent, then lets it finish."""
    plan = [("SIGKILL", MOMENTS[number % len(MOMENTS)]) for number in range(options.kills)]
    plan += [("SIGTERM", "stepping")] * options.stops
    chance.shuffle(plan)
    blows: list[Blow] = []
    with open(output_of(workdir), "wb") as output:
        while True:
            child = _start(settings, workdir, output)
            if len(blows) == len(plan):
                break
            sent, moment = plan[len(blows)]
            if not _reach(moment, workdir, child, chance, start_seconds):
                break  # it has ended by itself
            child.send_signal(getattr(signal, sent))
            status = child.wait(120)
            blows.append(_describe(len(blows) + 1, sent, moment, workdir, status))
            print(".", end="", flush=True)
        print(flush=True)
        status = child.wait(600)
    if status != 0:
        sys.exit(f"crash_test: the last start failed with {status}:\n{output_of(workdir).read_text()[-3000:]}")
    if len(blows) < len(plan):
        sys.exit(f"crash_test: the run was done after {len(blows)} of {len(plan)} interruptions; give more steps")
    return blows


def _reach(
    moment: str, workdir: pathlib.Path, child: subprocess.Popen[bytes], chance: random.Random, start_seconds: float
) -> bool:
    """Waits for a random point of the kind `moment`; False if the run ended before."""
    begun, rows, base = time.monotonic(), last_row(workdir), newest_checkpoint(workdir)
    known = saves(workdir)
    delay, distance = chance.random(), chance.randint(1, 2 * SAVE_EVERY)
    resumed = rows == base
    while child.poll() is None:
        # The first start may have compiled, which later ones need not: then the first new row is late enough.
        if moment == "starting" and (time.monotonic() - begun > delay * start_seconds or last_row(workdir) > rows):
            return child.poll() is None
        if moment == "saving":
            now = saves(workdir)
            known &= now  # what was left half-written is removed at the start, and its name comes again
            if any("tmp" in name for name in now - known):
                time.sleep(0.01 * delay)
                return child.poll() is None
        if moment == "stepping":
            row = last_row(workdir)
            resumed = resumed or row != rows  # cut back, or gone on
            if resumed and row >= base + distance:
                time.sleep(0.02 * delay)
                return child.poll() is None
        time.sleep(0.001)
    return False


def _describe(number: int, sent: str, moment: str, workdir: pathlib.Path, status: int) -> Blow:
    checkpoint, row, wrong = newest_checkpoint(workdir), last_row(workdir), ""
    if sent == "SIGTERM":
        if status != PREEMPTED:
            wrong = f"exit status {status} after SIGTERM instead of {PREEMPTED}"
        elif checkpoint != row:
            wrong = f"SIGTERM: the newest checkpoint is {checkpoint}, but step {row} was done"
    return Blow(number, sent, moment, row, checkpoint, unfinished(workdir), status, wrong)


# Looking into a workdir.


def output_of(workdir: pathlib.Path) -> pathlib.Path:
    return workdir.with_suffix(".txt")


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file that may be growing, or may have been cut by a kill."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def last_row(workdir: pathlib.Path) -> int:
    try:
        tail = (workdir / "metrics.jsonl").read_bytes()[-8192:].split(b"\n")[:-1]
        return max((json.loads(line)["step"] for line in tail[-2:] if line.startswith(b"{")), default=0)
    except (OSError, ValueError):
        return 0


def saves(workdir: pathlib.Path) -> frozenset[str]:
    folder = workdir / "checkpoints"
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def newest_checkpoint(workdir: pathlib.Path) -> int:
    return max((int(name) for name in saves(workdir) if name.isdigit()), default=0)


def unfinished(workdir: pathlib.Path) -> bool:
    return any("tmp" in name for name in saves(workdir))


# Comparing.


def compare_rows(whole: pathlib.Path, broken: pathlib.Path) -> list[str]:
    """Differences between two metrics files: missing, doubled or unequal values."""
    tables = []
    for path in (whole, broken):
        table: dict[tuple[int, str], list[Any]] = {}
        for row in read_rows(path):
            for name, value in row.items():
                if name != "step" and not is_measurement(name):
                    table.setdefault((row["step"], name), []).append(value)
        tables.append(table)
    expected, found = tables
    if not any(name.endswith("loss") for _, name in expected):
        return [f"{whole} holds no losses"]
    problems = [f"row {step}: {name} is written {len(v)} times" for (step, name), v in found.items() if len(v) > 1]
    problems += [f"row {step}: {name} is missing" for step, name in expected.keys() - found.keys()]
    problems += [f"row {step}: {name} is too much" for step, name in found.keys() - expected.keys()]
    for key in sorted(expected.keys() & found.keys()):
        a, b = expected[key][0], found[key][0]
        if a != b and not (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
            problems.append(f"row {key[0]}: {key[1]} is {b!r} instead of {a!r}")
    return problems


def compare_checkpoints(whole: pathlib.Path, broken: pathlib.Path) -> list[str]:
    """Differences between the newest checkpoints: every array of every item, by its bytes."""
    newest = [max(int(path.name) for path in root.iterdir() if path.name.isdigit()) for root in (whole, broken)]
    if newest[0] != newest[1]:
        return [f"the newest checkpoint is {newest[1]} instead of {newest[0]}"]
    a, b = (read_arrays(root / str(newest[0])) for root in (whole, broken))
    if not any(name.startswith("params/") for name in a) or not any(name.startswith("optimizer/") for name in a):
        return [f"{whole} holds no params and optimizer to compare"]
    problems = [f"{name} is in one checkpoint only" for name in a.keys() ^ b.keys()]
    for name in sorted(a.keys() & b.keys()):
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape) or a[name].tobytes() != b[name].tobytes():
            problems.append(f"{name} differs")
    return problems


def read_arrays(checkpoint: pathlib.Path) -> dict[str, Any]:
    """All arrays of a checkpoint as numpy arrays by `item/path`, read with Orbax alone."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    arrays = {}
    for item in sorted(path for path in epath.Path(checkpoint).iterdir() if (path / "_METADATA").exists()):
        handler = ocp.PyTreeCheckpointHandler()
        shapes = handler.metadata(item)
        shapes = getattr(shapes, "tree", None) or getattr(shapes, "item_metadata", shapes)
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        restored = handler.restore(item, args=ocp.args.PyTreeRestore(restore_args=arguments))
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            name = "/".join(str(getattr(key, "key", key)) for key in path)
            arrays[f"{item.name}/{name}"] = np.asarray(leaf)
    return arrays


def check_goodput(workdir: pathlib.Path, blows: list[Blow], *, steps: int, begun: float, ended: float) -> list[str]:
    """What is wrong with the account of where the time went: parts that do not add up, steps lost and not counted."""
    found = json.loads("\n".join(spent(str(workdir), as_json=True)))
    wall, parts, starts = found["wall_seconds"], sum(found["seconds"].values()), found["starts"]
    went = [start for start in starts if start["first_step"] is not None]
    again = sum(start["last_step"] - start["first_step"] for start in went) - steps
    last = starts[-1]["began"] + sum(starts[-1]["seconds"].values())
    # From outside: an interpreter takes its time before the command begins, and after it has ended.
    problems = [] if begun <= found["began"] < begun + 5 else [f"goodput: began at {found['began']}, not {begun}"]
    problems += [] if ended - 5 < last <= ended else [f"goodput: ended at {last}, not {ended}"]
    if abs(parts - (last - found["began"])) > 0.01 * wall:
        problems.append(f"goodput: the parts are {parts:.2f} s, the wall clock is {last - found['began']:.2f} s")
    if found["lost_steps"] != again:
        problems.append(f"goodput: {found['lost_steps']} steps are counted as lost, {again} were done again")
    if (again > 0) != (found["seconds"].get("lost", 0) > 0):
        problems.append(f"goodput: {again} steps lost, {found['seconds'].get('lost', 0)} s")
    ends = {start["ended"] for start in starts} - {"killed", "stopped", "finished"}
    if ends or len(starts) > len(blows) + 1 or starts[-1]["ended"] != "finished":
        problems.append(f"goodput: {len(starts)} starts, ended {[start['ended'] for start in starts]}")
    return problems


def _print(blows: list[Blow], problems: list[str], options: argparse.Namespace) -> None:
    print(f"{'':>4} {'sent':8} {'moment':9} {'row':>5} {'newest':>7} {'half-written':>12} {'status':>7}")
    for blow in blows:
        half = "yes" if blow.unfinished else ""
        line = f"{blow.number:>4} {blow.sent:8} {blow.moment:9} {blow.row:>5} {blow.checkpoint:>7} {half:>12}"
        print(f"{line} {blow.status:>7} {blow.wrong}")
    inside = sum(blow.unfinished for blow in blows)
    print(f"{len(blows)} interruptions, {inside} of them inside the writing of a checkpoint (seed {options.seed})")
    for problem in problems[:20]:
        print(f"DIFFERENT: {problem}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    print("different" if problems else "equal: parameters, optimizer state and every logged value, bit for bit")


if __name__ == "__main__":
    sys.exit(main())
