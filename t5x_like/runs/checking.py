"""What `train --check` and `rl --check` find wrong with a config, without its data: any number of configs in a process.

For programs that start runs elsewhere. Devices that are not there are stood in for by as many fake CPU devices: shapes
and meshes must fit, what a TPU's compiler would say of them is `t5x_like plan`'s business.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t5x_like.core.errors import UsageError
from t5x_like.parallel import mesh as meshes
from t5x_like.runs import branch, rl_program, roles
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.runs.functions import named_functions
from t5x_like.runs.rl_program import RlExperiment
from t5x_like.runs.sections import may_change
from t5x_like.runs.train import Experiment
from t5x_like.storage.workdir import Workdir, read_config

# What the traced programs of a run do not depend on, by section; of `loop`, all but these.
_OUTSIDE_OF_PROGRAMS = ("seed", "optim", "checkpoint", "evaluate", "telemetry", "runtime", "loop")
_LOOP_IN_PROGRAMS = ("micro_batches", "ema_decay")


@dataclasses.dataclass(frozen=True)
class Checked:
    """A config that nothing is wrong with. steps: its config.loop.steps. metrics: what its evaluations measure, such
    as `loss`. config: as config.json would hold it."""

    steps: int
    metrics: tuple[str, ...]
    config: dict[str, Any]


class Checker:
    """Checks configs one after the other; programs that differ in numbers alone are traced once.

    devices: those that each run will have, or fakes in their place. slices: how many slices of TPUs they are, where
    that is known. there: whether the models and runs that a config names must be readable from here.
    """

    def __init__(self, devices: Sequence[jax.Device], *, slices: int | None, there: bool):
        self._devices, self._slices, self._there = list(devices), slices, there
        self._traced: dict[str, tuple[str, ...]] = {}

    def check(
        self, config: Mapping[str, Any], overrides: Mapping[str, Any], *, workdir: str = "", devices: int | None = None
    ) -> Checked:
        """Raises UserError in one line for a config that could not start. devices: how many, by default all.

        workdir: where it will run; a run that it holds must be of this config.
        """
        stored = read_config(workdir) if workdir else None
        experiment = self._built(config, overrides, stored)
        chosen = self._devices[: len(self._devices) if devices is None else devices]
        sizes = meshes.axis_sizes(experiment.mesh, len(chosen))
        if self._slices is not None:
            meshes.across_slices(sizes, self._slices)
        programs.check_mesh(experiment, sizes)
        if isinstance(experiment, RlExperiment):
            rl_program.check_rows(experiment, sizes)
        resolved = experiments.to_dict(experiment)
        _check_filled_in(resolved, "config")
        if stored is not None:
            Workdir(workdir, process=0, write=False).check_config(resolved, may_change=may_change(type(experiment)))
        experiments.check_schedule(experiment)
        return Checked(experiment.loop.steps, self._measured(experiment, chosen, resolved), resolved)

    def _built(
        self, config: Mapping[str, Any], overrides: Mapping[str, Any], stored: Mapping[str, Any] | None
    ) -> Experiment:
        if "rl" in config:
            named = named_functions(config)[0]
            experiment: Experiment = experiments.built(RlExperiment, named, overrides=overrides, stored=stored)
        else:
            experiment = experiments.from_config(config, overrides=overrides, stored=stored)
        source = experiment.checkpoint.branch_from
        if source is None or stored is not None or not self._there:
            return experiment
        return branch.replaced(experiment, branch.resolve(source))

    def _measured(
        self, experiment: Experiment, devices: Sequence[jax.Device], resolved: dict[str, Any]
    ) -> tuple[str, ...]:
        """Builds and traces the programs: what does not fit shows there. The names of what an evaluation sums."""
        mesh = meshes.make(experiment.mesh, devices)
        opened = roles.open_role if self._there else roles.open_or_assume(experiment.model, {})
        with jax.set_mesh(mesh):
            program = programs.step_program(experiment, mesh, opened=opened)
            mark = _mark(resolved, len(devices))
            if mark not in self._traced:
                layout = program.layout
                program.step.trace(layout.state, layout.frozen, program.batch)
                sums = jax.eval_shape(program.evaluate, layout.state["params"], layout.frozen, program.batch)
                if isinstance(experiment, RlExperiment) and (self._there or not experiment.roles):
                    # All programs beside the step are built, which fails for models that do not go together.
                    rl_program.stages(experiment, program)
                self._traced[mark] = tuple(sums)
        return self._traced[mark]


def _check_filled_in(value: Any, path: str) -> None:
    """UsageError for the first text that still holds the REPLACE/ of a shared config; no run could read it."""
    if isinstance(value, str) and "REPLACE/" in value:
        raise UsageError(f"{path}={value} is to be filled in; give --{path}=... with a path of yours")
    inner = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, each in value.items() if isinstance(value, Mapping) else inner:
        _check_filled_in(each, f"{path}.{name}")


def _mark(resolved: Mapping[str, Any], devices: int) -> str:
    """Equal for configs whose traced programs have equal shapes and shardings."""
    kept = {name: value for name, value in resolved.items() if name not in _OUTSIDE_OF_PROGRAMS}
    loop = {name: resolved["loop"][name] for name in _LOOP_IN_PROGRAMS}
    return json.dumps([devices, kept, loop, resolved["optim"]["name"]], sort_keys=True, default=repr)
