"""The memory of a run's train step by part on a mesh of devices that need not be there, in a second and without a
compiler. What the parts are is said in planner/sizes/footprint.py.

Traced is the step of ONE device: its rows, and the heads, columns and vocabulary that the rules leave it. So what is
saved needs no sharding; what a sequence axis gathers meanwhile is not in it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec
from t5x_like.layers import remat as remats
from t5x_like.layers.scoring.head_layout import CHUNK_BYTES
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as sharding_rules
from t5x_like.parallel.rules import MESH_AXES, Rules
from t5x_like.parallel.sharding import device_bytes
from t5x_like.planner.sizes.footprint import Footprint
from t5x_like.planner.sizes.saved import saved_bytes
from t5x_like.runs import program as programs
from t5x_like.runs.program import Program
from t5x_like.runs.roles import open_or_assume
from t5x_like.runs.train import Experiment

# Float32 logits of a chunk of tokens and their gradient, which the loss holds at once.
_LOGITS_BYTES = 2 * CHUNK_BYTES
_FLOAT32 = 4
_ONE: dict[str, int] = dict.fromkeys(MESH_AXES, 1)


class Footprints:
    """Footprints of many runs: what differs in the mesh, the optimizer or the depth alone is traced once.

    platform, kind: of the devices, as jax has them: "tpu" and "TPU v5".
    """

    def __init__(self, *, platform: str, kind: str):
        self._platform, self._kind = platform, kind
        self._saved: dict[str, int] = {}

    def of(self, experiment: Experiment, sizes: Mapping[str, int]) -> Footprint:
        """sizes: of every mesh axis (mesh.axis_sizes). UsageError for what does not divide."""
        program = self.program(experiment, sizes)
        state, parts = program.layout.state, experiment.loop.micro_batches
        parameters = device_bytes(state["params"])
        local = _on_one_device(experiment, program.model.rules, sizes)
        batch = _rows_of_a_device(program, sizes, parts)
        saved = self._saved_bytes(local, batch)
        least = remats.parse(local.model.remat)[-1].policy  # of the layers that save least
        again = max(self._layer(local, batch, "none") - self._layer(local, batch, least), 0)
        return Footprint(
            parameters=parameters,
            frozen=device_bytes(program.layout.frozen),
            optimizer=device_bytes(state["optimizer"]),
            average=device_bytes(state.get("ema", {})),
            gradients=parameters if parts == 1 else parameters + device_bytes(_as_float32(state["params"])),
            saved=saved,
            working=max(again + _layer_weights(program, sizes), _loss(program, sizes, batch)),
        )

    def program(self, experiment: Experiment, sizes: Mapping[str, int]) -> Program:
        """The programs of a run on devices of this kind, which need not be there."""
        mesh = meshes.abstract(sizes, platform=self._platform, kind=self._kind)
        return programs.step_program(experiment, mesh, opened=open_or_assume(experiment.model, {}))

    def _layer(self, local: Experiment, batch: Mapping[str, jax.ShapeDtypeStruct], remat: str) -> int:
        """Bytes that one layer more leaves for the backward pass, of the deepest stack's kind, under this policy."""
        rows = next(iter(batch.values())).shape[0]
        row = {name: jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype) for name, array in batch.items()}
        one, two = (_of_depth(local, layers, remat) for layers in (1, 2))
        return rows * (self._saved_bytes(two, row) - self._saved_bytes(one, row))

    def _saved_bytes(self, local: Experiment, batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
        mark = repr((local.model, local.objective, local.adapter, sorted(local.roles), sorted(batch.items())))
        if mark not in self._saved:
            self._saved[mark] = self._traced(local, batch)
        return self._saved[mark]

    def _traced(self, local: Experiment, batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
        program = self.program(local, _ONE)
        frozen, objective = program.layout.frozen, program.objective

        def loss(params: Any, rest: Any) -> Any:
            frozen, batch = rest
            totals = jax.tree.map(jnp.ones_like, objective.weights(batch))
            return objective.loss(params, frozen, batch, None, totals)[0]

        batches = ((frozen, dict(batch)), (frozen, _one_row_more(batch)))
        with jax.sharding.use_abstract_mesh(cast(AbstractMesh, program.mesh)):
            return saved_bytes(loss, program.layout.state["params"], batches)


def _one_row_more(batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((array.shape[0] + 1, *array.shape[1:]), array.dtype) for name, array in batch.items()
    }


def _rows_of_a_device(program: Program, sizes: Mapping[str, int], parts: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one micro-batch on one device."""
    found = {}
    for name, spec in program.objective.inputs.items():
        cut = [_shards(program.model.rules, axis, sizes) for axis in spec.axes]
        rows, *rest = (max(dim // by, 1) for dim, by in zip(spec.shape, cut, strict=True))
        found[name] = jax.ShapeDtypeStruct((max(rows // parts, 1), *rest), spec.dtype)
    return found


def _shards(rules: Rules, axis: str | None, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in rules.mesh_axes(axis))


def _on_one_device(experiment: Experiment, rules: Rules, sizes: Mapping[str, int]) -> Experiment:
    """The run with the heads and columns of one device of a mesh."""

    def part(count: int, axis: str) -> int:
        return max(count // _shards(rules, axis, sizes), 1)

    def cut(stack: Any) -> Any:
        if stack is None:
            return None
        heads = part(stack.heads, "act_heads")
        kv_heads = math.gcd(part(stack.kv_heads, "act_kv_heads"), heads)
        return dataclasses.replace(stack, heads=heads, kv_heads=kv_heads, mlp=part(stack.mlp, "act_mlp"))

    config = experiment.model
    model = dataclasses.replace(
        config,
        vocab_size=part(config.padded_vocab, "vocab"),
        encoder=cut(config.encoder),
        decoder=cut(config.decoder),
    )
    mesh = dataclasses.replace(experiment.mesh, rules="")
    return dataclasses.replace(experiment, model=model, mesh=mesh)


def _of_depth(local: Experiment, layers: int, remat: str) -> Experiment:
    def cut(stack: Any) -> Any:
        if stack is None:
            return None
        windows = stack.windows[:layers]
        theta = stack.rope.theta[: len(windows)]
        return dataclasses.replace(
            stack, layers=layers, windows=windows, rope=dataclasses.replace(stack.rope, theta=theta)
        )

    config = local.model
    model = dataclasses.replace(
        config, encoder=cut(config.encoder), decoder=cut(config.decoder), remat=remat, scan=False
    )
    return dataclasses.replace(local, model=model)


def _as_float32(params: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, "float32", sharding=a.sharding), params)


def _layer_weights(program: Program, sizes: Mapping[str, int]) -> int:
    """Weights of two layers as FSDP gathers them (one at work, the next under way), and the gradient of one before it
    is divided."""
    width = 2 * _itemsize(program) + _FLOAT32
    gathered = sharding_rules.gathered(program.model.rules)
    largest = 0
    for stack in _stacks(program.model.specs()):
        numbers = sum(_numbers(spec, gathered, sizes) / spec.shape[0] for _, spec in tree.leaves(stack))
        largest = max(largest, int(numbers * width))
    return largest


def _stacks(specs: Any) -> list[Any]:
    """The subtrees of layers."""
    found = [specs["layers"]] if "layers" in specs else []
    return found + [specs[name]["layers"] for name in ("encoder", "decoder") if name in specs]


def _numbers(spec: ParamSpec, rules: Rules, sizes: Mapping[str, int]) -> int:
    return math.prod(spec.shape) // math.prod(_shards(rules, axis, sizes) for axis in spec.axes)


def _itemsize(program: Program) -> int:
    return 2 if program.model.dtypes.compute == "bfloat16" else _FLOAT32


def _loss(program: Program, sizes: Mapping[str, int], batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """The gathered head, its gradient in float32 before and after it is added up, and logits of a chunk."""
    config, rules = program.model.config, sharding_rules.gathered(program.model.rules)
    columns = config.padded_vocab // _shards(rules, "vocab", sizes)
    head = columns * config.width * (_itemsize(program) + 2 * _FLOAT32)
    tokens = sum(array.size for name, array in batch.items() if name.rpartition("/")[2] == "targets")
    return head + min(2 * _FLOAT32 * tokens * columns, _LOGITS_BYTES)
