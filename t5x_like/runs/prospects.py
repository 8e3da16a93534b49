"""What is known of the points of a search before any compile: whether `train` would take them, and what they hold.

The checks are those of a run: the config with the point in it, its mesh on the devices, every parameter on the mesh,
the batch. What the compiler says is the planner's business.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t5x_like.core.errors import UserError
from t5x_like.layers.attention import kernels
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as sharding_rules
from t5x_like.parallel.sharding import device_bytes
from t5x_like.planner.search import analytic, space
from t5x_like.planner.search.step import BIASED, Step
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.runs.arguments import load_config
from t5x_like.runs.roles import open_or_assume
from t5x_like.runs.train import Experiment

_MADE = (
    *("config.model.remat", "config.model.scan", "config.model.attention_block"),
    *("config.loop.micro_batches", "config.mesh.rules"),
    *(f"config.mesh.{axis}" for axis in sharding_rules.MESH_AXES),
)
_VMEM = "xla_tpu_scoped_vmem_limit_kib"


class Prospects:
    """Looks at points of one config on some devices, which may be absent ones.

    arguments: the `--config...` arguments of all points. own_options: whether programs will be compiled with the
    config's compiler options, not with the compiler's own.
    """

    def __init__(self, arguments: Sequence[str], devices: Sequence[jax.Device], *, own_options: bool):
        self._arguments, self._devices, self._own_options = tuple(arguments), list(devices), own_options
        self._configs: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]] | UserError] = {}
        self._states: dict[str, tuple[dict[str, int], dict[str, int], int]] = {}
        self.base = self._experiment({})
        self._said = frozenset(each.partition("=")[0].removeprefix("--") for each in arguments) - {"config"}

    @property
    def around(self) -> space.Base:
        model, loop = self.base.model, self.base.loop
        try:
            shape = meshes.axis_sizes(self.base.mesh, len(self._devices))
        except UserError:
            if any(path.startswith("config.mesh.") for path in self._said):
                raise
            shape = {}
        return space.Base(
            self.base.mesh,
            shape,
            model.remat,
            loop.micro_batches,
            model.scan,
            self._said,
            attention_block=model.attention_block,
            lengths=self._lengths,
        )

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Tokens of the rows that a TPU's attention kernels may serve."""
        data, stacks = self.base.data, self.base.model.stacks
        lengths = {"encoder": data.encoder_length if len(stacks) == 2 else data.length, "decoder": data.length}
        found = {lengths[name] for name, stack in stacks.items() if stack.position not in BIASED}
        return tuple(sorted(length for length in found if length % kernels.LANES == 0))

    def step(self, point: space.Point) -> Step:
        """The step of a point for the analytic model. UserError, in one line, where `train` would refuse the point."""
        experiment = self._experiment(point.overrides)
        sizes, state, gradients = self._state(experiment)
        programs.check_mesh(experiment, sizes)
        turns = programs.schedule(experiment, sizes)
        options = experiment.runtime.compiler_options.of("tpu") or {}
        return Step(
            model=experiment.model,
            rules=sharding_rules.rules(experiment.mesh.rules),
            sizes=sizes,
            rows=experiment.data.batch_size,
            length=experiment.data.length,
            source_length=experiment.data.encoder_length,
            micro_batches=experiment.loop.micro_batches,
            state=state,
            gradients=gradients,
            vmem_kib=int(options.get(_VMEM, 0)) if self._own_options else 0,
            bubble=0.0 if turns is None else turns.bubble,
        )

    def look(self, point: space.Point, device: analytic.Device) -> tuple[str, analytic.Estimate | None]:
        """(why `train` would refuse the point, the analytic model's estimate of one that it takes)."""
        try:
            return "", analytic.estimate(self.step(point), device)
        except UserError as error:
            return str(error), None

    def _experiment(self, overrides: Mapping[str, Any]) -> Experiment:
        """Built as `train` builds it: values that the search made are set, texts of flags are overrides."""
        texts = tuple(f"--{path}={value}" for path, value in overrides.items() if not _is_made(path))
        if texts not in self._configs:
            try:
                self._configs[texts] = load_config([*self._arguments, *texts])
            except UserError as error:
                self._configs[texts] = error
        loaded = self._configs[texts]
        if isinstance(loaded, UserError):
            raise loaded
        config, given = loaded
        made = {path: value for path, value in overrides.items() if _is_made(path)}
        if made:
            config = copy.deepcopy(config)
            for path, value in made.items():
                *sections, field = path.removeprefix("config.").split(".")
                holder: Any = config
                for section in sections:
                    holder = holder[section]
                holder[field] = value
        return experiments.from_config(config, overrides=given)

    def _state(self, experiment: Experiment) -> tuple[dict[str, int], dict[str, int], int]:
        """(mesh sizes, {part of the state: bytes of a device}, bytes of its gradients). Remat and micro-batches change
        neither, so each mesh is built once."""
        resolved = experiments.to_dict(experiment)
        for section, fields in (("model", ("remat", "scan", "attention_block")), ("loop", ("micro_batches",))):
            resolved[section] = {name: value for name, value in resolved[section].items() if name not in fields}
        mark = repr(resolved)
        if mark not in self._states:
            mesh = meshes.make(experiment.mesh, self._devices)
            program = programs.step_program(experiment, mesh, opened=open_or_assume(experiment.model, {}))
            layout = program.layout
            parts = {
                "weights": device_bytes(layout.state["params"]),
                "optimizer": device_bytes(layout.state["optimizer"]),
                "averages": device_bytes(layout.state.get("ema", {})),
                "frozen": device_bytes(layout.frozen),
                "batch": device_bytes(program.batch),
            }
            self._states[mark] = dict(mesh.shape), parts, parts["weights"]
        return self._states[mark]


def _is_made(path: str) -> bool:
    """Whether a value was made by the search and is not the text of a flag."""
    return path in _MADE
