"""A run looked at in seconds, without a compiler and on devices that need not be there: all that stops it, and all that
is remarkable (findings.py)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from t5x_like.core.errors import UserError
from t5x_like.parallel import mesh as meshes
from t5x_like.planner.sizes.footprint import Footprint
from t5x_like.runs import findings, rl_program
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.runs.findings import Finding, Place
from t5x_like.runs.footprint import Footprints
from t5x_like.runs.planned import experiment_of
from t5x_like.runs.program import Program
from t5x_like.runs.rl_program import RlExperiment
from t5x_like.runs.roles import open_or_assume
from t5x_like.runs.train import Experiment

_ROWS = ("dim 'batch'", "dim 'length'")


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a run is looked at for. hbm_bytes: of a device, 0 for unknown: then no footprint is made.
    slices: of TPUs, 0 for unknown."""

    devices: int
    platform: str
    kind: str
    cores: int = 1
    hbm_bytes: int = 0
    slices: int = 0
    place: Place = dataclasses.field(default_factory=Place)


@dataclasses.dataclass(frozen=True)
class Report:
    """findings: the worst first. mesh: sizes of its axes, empty where there is none. footprint: bytes a device by part,
    None where the program cannot be built, or nobody knows what a device has."""

    findings: list[Finding]
    mesh: dict[str, int]
    footprint: Footprint | None

    @property
    def errors(self) -> int:
        return sum(each.level == "error" for each in self.findings)


def examine(config: Mapping[str, Any], overrides: Mapping[str, Any], target: Target) -> Report:
    """What stops a config from running on these devices, else what is remarkable about it there."""
    stopped: list[Finding] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except UserError as error:
            if not (stopped and str(error).startswith(_ROWS)):  # which check_mesh has said in words of the config
                stopped.append(findings.of_error(error))
            return None

    experiment = attempt(lambda: experiment_of(config, overrides))
    sizes = None if experiment is None else attempt(lambda: meshes.axis_sizes(experiment.mesh, target.devices))
    if experiment is None or sizes is None:
        return Report(stopped, {}, None)
    if target.slices:
        attempt(lambda: meshes.across_slices(sizes, target.slices))
    attempt(lambda: programs.check_mesh(experiment, sizes))
    if isinstance(experiment, RlExperiment):
        attempt(lambda: rl_program.check_rows(experiment, sizes))
    attempt(lambda: experiments.check_schedule(experiment))
    mesh = meshes.abstract(sizes, platform=target.platform, kind=target.kind, cores=target.cores)
    with jax.sharding.use_abstract_mesh(mesh):
        opened = open_or_assume(experiment.model, {})
        program = attempt(lambda: programs.step_program(experiment, mesh, opened=opened))
        found = None if program is None or stopped else attempt(lambda: _look(experiment, program, target))
    if found is None:
        return Report(stopped, sizes, None)
    footprint = None
    if target.hbm_bytes:
        footprint = attempt(lambda: Footprints(platform=target.platform, kind=target.kind).of(experiment, sizes))
        found += stopped if footprint is None else _memory(footprint, target)
    return Report(sorted(found, key=lambda each: findings.LEVELS.index(each.level)), sizes, footprint)


def at_start(experiment: Experiment, program: Program, *, hosts: int) -> list[str]:
    """Lines for a start screen: what should not be overlooked, of a program whose mesh is in context."""
    found = _looked(experiment, program, Place(hosts))
    return [each.line for each in found if each.level != "note" and each.path != "attention"]


def _look(experiment: Experiment, program: Program, target: Target) -> list[Finding]:
    return _looked(experiment, program, target.place)


def _looked(experiment: Experiment, program: Program, place: Place) -> list[Finding]:
    layout = program.layout
    jaxpr = program.step.trace(layout.state, layout.frozen, program.batch).jaxpr
    return findings.look(experiment, program, findings.activation_names(jaxpr), place)


def _memory(footprint: Footprint, target: Target) -> Sequence[Finding]:
    share = footprint.total / target.hbm_bytes
    what = f"about {share:.0%} of a device's memory by an estimate: {_gib(footprint.state)} of state, "
    what += (
        f"{_gib(footprint.gradients)} of gradients, {_gib(footprint.saved)} saved, {_gib(footprint.working)} at work"
    )
    if share <= 1:
        return [Finding("note", "memory", what)]
    remedy = "use more chips, more remat (config.model.remat) or config.loop.micro_batches; `plan` asks the compiler"
    return [Finding("warning", "memory", what, remedy)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
