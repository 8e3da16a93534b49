"""`t5x_like plan --search`: which mesh, rules, remat and micro-batches are the best for a config, by the TPU compiler.

    t5x_like plan --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4 --search --points=12
    t5x_like plan ... --search --search.mesh=fsdp,tensor --search.remat=dots,minimal --search.config.FIELD=A,B
    t5x_like train --config=... $(cat DIR/best.flags)

See docs/planner.md. The points themselves are judged by child processes, each a `t5x_like plan` of its own.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from t5x_like import __version__
from t5x_like.commands import plan_slices
from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.terminal import format_bytes
from t5x_like.storage import lock, paths

BEST, RESULTS = "best.flags", "results.md"
_CONFIRM = 2
_GIB = 2**30
# Flags of a search, which mean nothing without it.
_OWN = ("search_dir", "jobs", "memory_gib", "points", "point_minutes", "pin")


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--search", action="store_true", help="find the best mesh, rules, remat and micro-batches")
    group.add_argument("--search_dir", metavar="DIR", help="its folder; it goes on there; default: runs/search-...")
    group.add_argument("--jobs", type=int, help="points that are compiled at once; default: a half of the cores")
    group.add_argument("--memory_gib", type=float, help="memory of all judges together; default: 80%% of what is free")
    group.add_argument("--points", type=int, help="points that the compiler judges at most; default: 12")
    group.add_argument("--point_minutes", type=float, help="limit of each judge; default: 60, 0 for none")
    group.add_argument("--pin", nargs="?", const="", metavar="FILE", help="write the best as a config beside this one")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the `--search.DIMENSION=VALUES` arguments, the others)."""
    chosen = [each for each in arguments if each.startswith("--search.")]
    return chosen, [each for each in arguments if not each.startswith("--search.")]


def check(options: argparse.Namespace, dimensions: Sequence[str]) -> None:
    """Raises UsageError for flags that do not go together and numbers out of range."""
    given = [*dimensions, *(f"--{name}" for name in _OWN if getattr(options, name) is not None)]
    if not options.search:
        for each in given:
            raise UsageError(f"{each} is of a search; give --search too")
        return
    if options.program not in (None, "train"):
        raise UsageError(f"--search is of train steps, not of --program={options.program}; leave one out")
    for name in ("json", "html", "price", "details", "default_options"):
        if getattr(options, name):
            raise UsageError(f"--search writes plans of its own kind to --search_dir; leave out --{name}")
    for name, least in (("jobs", 1), ("points", 1)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UsageError(f"--{name}={getattr(options, name)} should be at least {least}")
    for name in ("memory_gib", "point_minutes"):
        if getattr(options, name) is not None and not 0 <= getattr(options, name) < 1e6:
            raise UsageError(f"--{name}={getattr(options, name):g} should be a number from 0")


def run(arguments: Sequence[str], dimensions: Sequence[str], options: argparse.Namespace) -> int:
    """arguments: the `--config...` ones. The environment stands already."""
    from t5x_like.planner.search import report as search_report
    from t5x_like.planner.topology import topology

    # Opened once for the number of devices; --slices, or config.mesh.slice, says of how many slices.
    place = topology(options.topology, slices=_slices(arguments, options))
    folder = _folder(arguments, options)
    pinned = _pin_path(arguments, options) if options.pin is not None else None
    with lock.locked(folder):
        search = _prepared(arguments, dimensions, options, place, folder)
        limits = _judging(options)
        search.reopen(limits)
        _say(f"{len(search.index):,} points, judged in {folder}, {_jobs(options)} at once")
        _judge(search, arguments, options, limits)
        text = search_report.to_text(search.index, place.hbm_bytes)
        paths.write_text_atomic(paths.join(folder, RESULTS), search_report.to_markdown(search.index, place.hbm_bytes))
        print(text)
        best = search.best()
        if best is None:
            raise UserError(
                f"no point that was judged fits {options.topology}: {search.why_none()} ({paths.join(folder, RESULTS)})"
            )
        flags = paths.join(folder, BEST)
        paths.write_text_atomic(flags, "".join(f"{flag}\n" for flag in best.point.flags))
    print(f"\nbest: {best.name}\n  t5x_like train {shlex.join(arguments)} $(cat {flags}) --workdir=...")
    if pinned is not None:
        from t5x_like.runs.pinning import write_pinned

        write_pinned(pinned, arguments, best, place)
        print(f"  t5x_like train --config={pinned} --workdir=...")
    return 0


def _prepared(
    arguments: Sequence[str], dimensions: Sequence[str], options: argparse.Namespace, place: Any, folder: str
) -> Any:
    """The search with all that is known before a compile."""
    from t5x_like.parallel import rules as sharding_rules
    from t5x_like.planner.search import analytic, space
    from t5x_like.planner.search import course as search
    from t5x_like.planner.search import index as search_index
    from t5x_like.runs.prospects import Prospects
    from t5x_like.runs.train import to_dict

    device = analytic.device(accelerators.parse(options.topology))
    trial = Prospects(arguments, place.devices, own_options=True)
    table = sharding_rules.rules(trial.base.mesh.rules)
    idle = sharding_rules.idle(table, dict.fromkeys(space.AXES, 2))
    searched = space.read(dimensions, trial.around, idle=idle)
    # Exploring with the compiler's default options takes a quarter of the time; the best are then judged as they run.
    explores = bool(trial.base.runtime.compiler_options.of("tpu")) and not searched.sets_compiler_options
    prospects = Prospects(arguments, place.devices, own_options=not explores)
    entries = []
    for point in space.points(searched, prospects.around, len(place.devices), slices=place.slices):
        problem, found = prospects.look(point, device)
        known = {} if found is None else _figures(found)
        state, said = search.first_state(problem, known, place.hbm_bytes, device.host_memory)
        entries.append(search_index.Entry(point, state, said, known))
    if not entries:
        raise UsageError("--search: the space is empty; give another mesh axis or another dimension")
    legal = [entry for entry in entries if entry.state != search_index.ILLEGAL]
    if not legal:
        raise UsageError(f"--search: no point can run, such as {entries[0].name}: {entries[0].said}")
    settings = {
        "arguments": list(arguments),
        "topology": place.name,
        "slices": place.slices,
        "default_options": explores,
        "config": json.loads(json.dumps(to_dict(trial.base), default=str)),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")} | {"t5x_like": _version()},
    }
    index = search_index.opened(folder, settings, entries)
    paths.make_directory(paths.join(folder, search_index.POINTS))
    index.write()
    limits = search.Limits(options.points or 12, _CONFIRM if explores else 0, place.hbm_bytes)
    return search.Search(index, limits)


def _version() -> str:
    """Of this program: its number, and the commit of a source tree."""
    from t5x_like.storage import manifest

    commit = (manifest.revision() or {}).get("commit", "")
    return f"{__version__} {commit[:12]}".strip()


def _slices(arguments: Sequence[str], options: argparse.Namespace) -> int:
    from t5x_like.runs.arguments import load_config

    return plan_slices.of(options.slices, load_config(arguments)[0])


def _figures(found: Any) -> dict[str, Any]:
    return {
        "bytes": found.bytes,
        "on_host": found.on_host,
        "seconds": round(found.step_seconds, 6),
        "bound_by": found.bound_by,
        "memory": found.memory,
        "parts": {name: round(seconds, 6) for name, seconds in found.seconds.items()},
    }


# Judging.


def _judge(search: Any, arguments: Sequence[str], options: Any, limits: Any) -> None:
    """Explores, then confirms the best; returns when nothing is left to be judged."""
    from t5x_like.planner.search.judges import Judges

    with Judges(
        _jobs(options), memory=int(limits[0]), seconds=limits[1], environment={"JAX_PLATFORMS": "cpu"}
    ) as judges:
        for confirms in (False, True):
            round_ = _Round(search, arguments, options, limits, confirms=confirms)
            judges.run(round_.following, round_.ended)


@dataclasses.dataclass
class _Round:
    """Turns names into commands, and what their processes leave behind into what the search is told."""

    search: Any
    arguments: Sequence[str]
    options: argparse.Namespace
    limits: tuple[float, float]
    confirms: bool

    def following(self) -> Any:
        """The next task; a plan that a killed search left behind is taken as it is."""
        from t5x_like.planner.search.judges import Task

        while True:
            name = self.search.following_to_confirm() if self.confirms else self.search.following()
            if name is None:
                return None
            path = self.search.index.plan_path(name, confirmed=self.confirms)
            if not self._read(name, path):
                log = f"{path.removesuffix('.json')}.log"
                return Task(name, self._command(name, path), log)

    def ended(self, task: Any, outcome: Any) -> None:
        path = self.search.index.plan_path(task.name, confirmed=self.confirms)
        if outcome.status == 0 and self._read(task.name, path, seconds=outcome.seconds, peak=outcome.peak):
            return
        said = outcome.said.removeprefix("t5x_like: ").removeprefix("error: ")
        if "does not fit" in said:
            (self.search.not_confirmed if self.confirms else self.search.refused)(task.name, said)
        else:
            (self.search.unconfirmed if self.confirms else self.search.failed)(task.name, said, self.limits)
        _say(f"{task.name}: {said}")

    def _command(self, name: str, path: str) -> tuple[str, ...]:
        point, settings = self.search.index[name].point, self.search.index.settings
        words = [sys.executable, "-m", "t5x_like", "plan", *self.arguments, *point.flags]
        words += [f"--topology={settings['topology']}", f"--slices={settings['slices']}"]
        words += ["--program=train", f"--json={path}"]
        if settings["default_options"] and not self.confirms:
            words.append("--default_options")
        return tuple(words + ([f"--cache={self.options.cache}"] if self.options.cache else []))

    def _read(self, name: str, path: str, *, seconds: float | None = None, peak: int = 0) -> bool:
        """Tells the search what a plan says; whether there is one."""
        from t5x_like.planner.search import course as search

        try:
            plan = json.loads(pathlib.Path(path).read_text())
            found, fits, problem = search.verdict(plan), plan["fits"], str(plan["problem"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not fits:  # the compiler's word, which counts before the bytes
            (self.search.not_confirmed if self.confirms else self.search.refused)(name, problem)
            _say(f"{name}: {problem}")
            return True
        took = "kept from before" if seconds is None else f"{seconds:.0f} s, {format_bytes(peak)} of memory"
        (self.search.confirmed if self.confirms else self.search.judged)(name, found)
        _say(f"{name}: {found.seconds:.4g} s a step, {format_bytes(found.bytes)} ({took})")
        return True


def _judging(options: argparse.Namespace) -> tuple[float, float]:
    """(bytes of all judges together, seconds of each); 0 for no limit."""
    from t5x_like.planner.search.judges import available_memory

    memory = 0.8 * available_memory() if options.memory_gib is None else options.memory_gib * _GIB
    minutes = 60.0 if options.point_minutes is None else options.point_minutes
    return round(memory), 60.0 * minutes


def _jobs(options: argparse.Namespace) -> int:
    """A compilation keeps a little more than one core busy."""
    from t5x_like.core.environment import cores

    return options.jobs or max(1, cores() // 2)


def _say(line: str) -> None:
    print(f"search: {line}", file=sys.stderr, flush=True)


# Files.


def _folder(arguments: Sequence[str], options: argparse.Namespace) -> str:
    """The folder of the search, made, and known to be writable before anything is compiled."""
    if options.search_dir and paths.is_remote(options.search_dir):
        raise UserError(f"--search_dir={options.search_dir}: a search is kept on a disk; copy it afterwards")
    file = next(each.partition("=")[2] for each in arguments if each.startswith("--config="))
    stem = pathlib.Path(file.partition(":")[0]).stem
    usual = os.path.join("runs", f"search-{stem}-{options.topology.replace(':', '-')}")
    folder = os.path.expanduser(options.search_dir or usual)
    paths.make_directory(folder)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--search_dir={folder} is not writable; choose another folder")
    return folder


def _pin_path(arguments: Sequence[str], options: argparse.Namespace) -> pathlib.Path:
    from t5x_like.runs.pinning import pinned_path

    return pinned_path(arguments, options.pin, topology=options.topology)
