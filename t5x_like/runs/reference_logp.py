"""What a reference model says of the pairs of a run: computed before its first step, read from the token cache after.

With `config.objective.dpo.reference="cache"` the reference (config.roles.reference) is read at each start, so that its
parameters are known by their fingerprint; if the cache lacks its log-probabilities of any pair, these are computed on
the run's mesh, a part at a time. Then it is let go, before the state of the run is made: no step holds it.

Process 0 writes, and a part that is there is kept: a start that is ended in between goes on with the next part. The
function is that of the objective for a second model, on the arrays that a step would read, so that losses are those of
`reference="role"` but for roundings of the compiler (tests/end_to_end/test_reference_logp.py).
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.core import tree
from t5x_like.core.terminal import Progress
from t5x_like.core.types import ArraySpec, Tree
from t5x_like.data.config import DataConfig
from t5x_like.data.read.interface import Draw
from t5x_like.data.read.loader import Component, TrainData
from t5x_like.data.read.pairs_apart import PairsApart
from t5x_like.data.read.sequences import Pairs
from t5x_like.data.reference_logp import NAME, Store, about
from t5x_like.objectives import dpo, pairs
from t5x_like.objectives.interface import frozen_role
from t5x_like.parallel.sharding import abstract_batch, addressable_rows, global_batch, named, replicated
from t5x_like.runs.program import Program
from t5x_like.runs.roles import FrozenModel, check_tokenizers, frozen_models, open_role
from t5x_like.runs.train import Experiment
from t5x_like.storage import fingerprint
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.model_directory import DamagedCheckpoint
from t5x_like.training.saver import check_sources
from t5x_like.training.session import Session

_ROLE = "reference"
_IN_FLIGHT = 2  # batches


@dataclasses.dataclass(frozen=True)
class _Set:
    component: Component
    store: Store


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """A compiled function (params, batch) -> [rows, 2] on every device, with the batch that it takes."""

    run: Any
    params: Tree
    batch: Mapping[str, jax.ShapeDtypeStruct]
    rows: int

    def __call__(self, component: Component, first: int, stop: int) -> jax.Array:
        """Of the rows from `first` of a set; those from `stop` on are filled up with the last."""

        def read(rows: np.ndarray) -> dict[str, np.ndarray]:
            numbers = np.minimum(first + rows, stop - 1)
            return component.reader.batch(numbers, Draw("", np.zeros_like(numbers)))

        return self.run(self.params, global_batch(read, rows=addressable_rows(self.batch), arrays=self.batch))


def attach(
    experiment: Experiment, session: Session, program: Program, data: TrainData, *, cache: str, beside: str
) -> dict[str, dict[str, str]]:
    """Gives the readers of pairs the log-probabilities of the reference, which are computed where they are missing.

    {role: its source and fingerprint} for the notes of checkpoints, {} for a run that reads none and for a check, which
    only opens the reference. cache, beside: as for the token cache. Raises UserError for a reference that is not the
    one that a resumed run has had so far.
    """
    if not experiment.cached_roles:
        return {}
    length = max(experiment.data.length, experiment.data.encoder_length)
    platform = program.mesh.devices.flat[0].platform
    configs = {_ROLE: experiment.roles[_ROLE]}
    role = frozen_models(configs, length=length, platform=platform, pipeline=None, opened=open_role)[_ROLE]
    check_tokenizers({_ROLE: role}, data.vocabulary.fingerprint)
    dpo.check_reference(program.model, role.model)
    if session.request.check:
        return {}
    params = _read(role, program)
    found = {_ROLE: {"source": role.stored.directory, "fingerprint": fingerprint.digest(tree.flatten(params))}}
    _check_before(session, found)
    model = {"fingerprint": found[_ROLE]["fingerprint"], "compute": role.model.dtypes.compute}
    sets = [
        _Set(component, Store(_about(experiment.data, component, model), cache, beside=beside))
        for component in data.components
    ]
    missing = [each.store.missing() for each in sets] if session.processes.primary else []
    missing = session.processes.broadcast("parts of reference log-probabilities", missing, timeout=math.inf)
    if any(missing):
        _compute(_compile(experiment, session, program, role, params), session, sets, missing)
    session.processes.broadcast("reference log-probabilities are complete", True, timeout=math.inf)
    for each in sets:
        reader = each.component.reader
        assert isinstance(reader, Pairs | PairsApart), "the objective reads features='pairs'"
        reader.reference = each.store.read()
    return found


def _about(config: DataConfig, component: Component, model: Mapping[str, str]) -> dict[str, Any]:
    return about(config, tokens=component.tokens.fingerprint, rows=component.reader.size.rows, model=model)


def _read(role: FrozenModel, program: Program) -> Tree:
    """Its parameters, as its rules lay them on the mesh."""
    assert role.part.source is not None, "a model of config.roles has a source"
    rules = role.model.rules
    return role.part.source.read(
        tree.map_with_path(
            lambda _, spec: jax.ShapeDtypeStruct(
                spec.shape, spec.dtype, sharding=named(program.mesh, rules, spec.axes, spec.shape)
            ),
            role.part.specs,
        )
    )


def _check_before(session: Session, found: Mapping[str, Mapping[str, str]]) -> None:
    """Before anything is computed: what a resumed run has read so far."""
    checkpoints = Checkpoints(session.workdir.checkpoints, read_only=True)
    step = checkpoints.latest()
    if step is None:
        return
    try:
        note = checkpoints.metadata(step)
    except DamagedCheckpoint:  # the saver goes back to the one before, and compares then
        return
    check_sources(note.get("roles", {}), found, where=f"step {step} in {checkpoints.directory}")


def _compile(experiment: Experiment, session: Session, program: Program, role: FrozenModel, params: Tree) -> _Scorer:
    """Batches have the rows of a micro-batch, whose activations the devices hold in training too."""
    rows = experiment.data.batch_size // experiment.loop.micro_batches
    specs = {
        name: ArraySpec((rows, *spec.shape[1:]), spec.dtype, spec.axes)
        for name, spec in program.objective.inputs.items()
        if not name.endswith(NAME)
    }
    batch = abstract_batch(program.mesh, program.model.rules, specs)
    reference = frozen_role(role.model, _ROLE)

    def score(params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        logp = dpo.answer_logp(reference, {}, {_ROLE: params}, pairs.texts(batch), mean=False, key=None)
        return jnp.stack(pairs.sides(logp), axis=1)

    options = experiment.runtime.compiler_options.of(program.mesh.devices.flat[0].platform)
    jitted = jax.jit(score, out_shardings=replicated(program.mesh), compiler_options=options)
    with session.faults.phase("compile"):
        return _Scorer(jitted.lower(params, batch).compile(), params, batch, rows)


def _compute(scorer: _Scorer, session: Session, sets: Sequence[_Set], missing: Sequence[Sequence[int]]) -> None:
    """Makes the missing parts, one after the other; all processes compute, process 0 writes."""
    primary = session.processes.primary
    total = sum(len(each.store.rows_of(part)) for each, parts in zip(sets, missing, strict=True) for part in parts)
    progress = Progress(total, label="prepare: what the reference says", unit="pairs") if primary else None
    done = 0
    try:
        for each, parts in zip(sets, missing, strict=True):
            for part in parts:
                rows = each.store.rows_of(part)
                numbers = np.concatenate(list(_numbers(scorer, each.component, rows)))
                done += len(rows)
                if progress is not None:
                    each.store.write(part, numbers)
                    progress.update(done)
            if primary:
                each.store.finish()
    finally:
        if progress is not None:
            progress.close()


def _numbers(scorer: _Scorer, component: Component, rows: range) -> Iterator[np.ndarray]:
    """[n, 2] of these rows, batch by batch."""
    waiting: collections.deque[tuple[int, jax.Array]] = collections.deque()
    for first in range(rows.start, rows.stop, scorer.rows):
        waiting.append((min(scorer.rows, rows.stop - first), scorer(component, first, rows.stop)))
        if len(waiting) == _IN_FLIGHT:
            count, found = waiting.popleft()
            yield np.asarray(found)[:count]
    for count, found in waiting:
        yield np.asarray(found)[:count]
