"""Checkpoints of a run: saved in the background, whole or not at all, kept and put aside. Built on Orbax's writer.

Layout: DIRECTORY/STEP/{ITEM/, metadata/}. An item is a tree of arrays; `metadata` is one JSON object of the same
commit: what the caller gives (config, axes, provenance) and, added here, `step`, `time`, `arrays` (shape and dtype by
item and path), `kinds`, `fingerprints`, `metrics`, and the sha256 of all that. Nothing in it depends on a mesh.

Orbax's CheckpointManager is not used: it refuses steps below its latest, forgets steps whose deletion never happened
because the save failed, and calls JAX's preemption sync point from its background thread with an old step number.
Which steps are kept is decided by a function that the caller hands in (training/keep.py). Reading is in reading.py.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.storage import leaves, paths
from t5x_like.storage.base import restore_items
from t5x_like.storage.fingerprint import fingerprints
from t5x_like.storage.model_directory import (
    COMMITTED,
    METADATA,
    DamagedCheckpoint,
    committed_steps,
    no_step,
    note,
    read_metadata,
)
from t5x_like.storage.quiet import quiet_orbax
from t5x_like.storage.reading import one_line

_TEMPORARY = ".orbax-checkpoint-tmp"
_CORRUPT = ".corrupt"
_DELETING = ".deleting"
_EVALUATION = "evaluation.json"
_MOST_PARTS = 100  # of one save; each may have failed on its own
CHUNK_BYTES = 16 << 20  # of an array in a file: what a reader of pieces (storage/streams.py) holds at least

Keep = Callable[[Sequence[int], Mapping[int, Mapping[str, float]]], Collection[int]]


class Checkpoints:
    """The checkpoints below one directory. All processes of a run call its methods in the same order.

    `keep(steps, metrics_by_step)` returns the steps to keep after each save. `on_fault` receives one line whenever
    something failed that training can survive; it may be called from a background thread. Readers beside a running
    training open it `read_only`: then nothing is cleaned up, renamed or deleted.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: Keep | None = None,
        asynchronous: bool = True,
        timeout_seconds: int = 1200,
        on_fault: Callable[[str], None] = print,
        read_only: bool = False,
    ):
        self.directory = paths.normal(directory)
        self._keep, self._asynchronous, self._on_fault, self._read_only = keep, asynchronous, on_fault, read_only
        self._thread: threading.Thread | None = None
        self._saved = True
        self._metrics: dict[int, dict[str, float]] = {}
        self._writer: ocp.AsyncCheckpointer | None = None
        quiet_orbax()
        if read_only:
            return
        if _is_main():
            paths.make_directory(self.directory)
            self._clean_up()
        _barrier("checkpoints-opened")
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=ocp.AsyncOptions(timeout_secs=timeout_seconds)
        )

    def steps(self) -> list[int]:
        """The committed steps, ascending, as they stand on the disk now."""
        return committed_steps(self.directory)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON object saved with a step. Raises DamagedCheckpoint, or UserError where there is no such step."""
        if step not in self.steps():
            raise no_step(self.directory, step, self.steps())
        return read_metadata(self._path(step))

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        metadata: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Begins to save `items` (name -> tree of arrays); returns when the arrays may be changed or donated.

        False if it failed at once (`on_fault` was told); whether it was committed is what `wait` returns. `metrics`
        are what `keep` judges this step by. A step at or below the latest is a defect of the caller: ValueError.
        """
        if self._writer is None:
            raise ValueError("these checkpoints were opened to be read only")
        self.wait()
        self._remove_failed()
        steps = self.steps()
        if steps and step <= steps[-1]:
            raise ValueError(f"step {step} is due after {steps[-1]}, which {self.directory} already holds")
        flat = {name: leaves.array_paths(item) for name, item in items.items()}
        # A metric that is no number can be no best one, and JSON has no NaN.
        self._metrics[step] = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        described, axes = self._note(step, items, flat, metadata), metadata.get("axes", {})
        parts: dict[str, Any] = {
            name: ocp.args.PyTreeSave(tree.unflatten(arrays), save_args=_cut(arrays, axes.get(name, {})))
            for name, arrays in flat.items()
            if arrays
        }
        parts[METADATA] = ocp.args.JsonSave(described)
        try:
            self._writer.save(epath.Path(self._path(step)), args=ocp.args.Composite(**parts))
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(step, error)
            return False
        self._thread = threading.Thread(target=self._finish, args=(step, steps), name=f"save-{step}")
        self._thread.start()
        return True if self._asynchronous else self.wait()

    def metrics(self, step: int) -> dict[str, float]:
        """What a step is judged by: saved with it, or given to `judge` later. {} if it was not evaluated."""
        return dict(self._metrics_of(step))

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives a step that is there already the metrics that `keep` judges it by, for this and every later start."""
        self._metrics[step] = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if _is_main() and step in self.steps():  # not of a branch, whose first step lies in another directory
            try:
                paths.write_json_atomic(self._path(step, _EVALUATION), self._metrics[step])
            except (OSError, UserError) as error:
                self._on_fault(f"{self._path(step)}: its evaluation could not be noted ({one_line(error)})")

    def wait(self) -> bool:
        """Waits for the save in progress. True if the last save that was begun is committed, or none was begun."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._saved

    def restore(self, step: int, templates: Mapping[str, Any], *, among: Sequence[str] = ()) -> dict[str, Any]:
        """The items of a step, as `base.restore_items` gives them, after the save in progress."""
        self.wait()
        if step not in self.steps():
            raise no_step(self.directory, step, self.steps())
        return restore_items(self._path(step), templates, among=among)

    def restore_latest(
        self, templates: Mapping[str, Any], *, among: Sequence[str] = ()
    ) -> tuple[int, dict[str, Any]] | None:
        """(step, items) of the newest sound checkpoint, None if there is none at all; damaged newer ones are put aside.

        Raises UserError when there are checkpoints and none is sound: a run must not silently begin again.
        """
        damaged: dict[int, str] = {}
        for step in reversed(_same_everywhere(self.steps())):
            try:
                items = self.restore(step, templates, among=among)
            except DamagedCheckpoint as error:
                damaged[step] = one_line(error)
                continue
            for bad, reason in damaged.items():
                if self._read_only:
                    raise DamagedCheckpoint(reason)
                self._on_fault(f"{reason}; it was renamed {self.quarantine(bad)}, step {step} is used")
            return step, items
        if damaged:
            # None is renamed: what fails for all of them may be this program or this machine.
            raise UserError(
                f"none of the checkpoints {sorted(damaged)} in {self.directory} can be restored; the newest: "
                f"{damaged[max(damaged)]}; restore one from a copy, or start in a new workdir"
            )
        return None

    def quarantine(self, step: int) -> str:
        """Renames a step to STEP.corrupt, so that it neither counts nor is lost. Returns the new name."""
        taken = set(paths.list_names(self.directory))
        names = [f"{step}{_CORRUPT}", *(f"{step}{_CORRUPT}-{count}" for count in range(2, 1000))]
        name = next(name for name in names if name not in taken)
        _barrier(f"quarantine-{step}-named")
        if _is_main():
            paths.rename(self._path(step), paths.join(self.directory, name))
        _barrier(f"quarantine-{step}")
        return name

    def close(self) -> None:
        """Waits for the save in progress and ends the background threads."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._remove_failed()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, step: int, *names: str) -> str:
        return paths.join(self.directory, str(step), *names)

    def _note(
        self, step: int, items: Mapping[str, Any], flat: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        for name, arrays in flat.items():
            for path, array in arrays.items():
                plain = isinstance(array, jax.Array | np.ndarray)
                if not plain or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                    raise TypeError(f"{name}/{path} is no array that can be saved but {type(array).__name__}")
        return note(
            step=step,
            arrays={
                name: {path: {"shape": list(a.shape), "dtype": np.dtype(a.dtype).name} for path, a in arrays.items()}
                for name, arrays in flat.items()
            },
            kinds={name: leaves.kinds(item) for name, item in items.items()},
            fingerprints={name: fingerprints(arrays) for name, arrays in flat.items()},
            metrics=self._metrics[step],
            metadata=metadata,
        )

    def _finish(self, step: int, before: Sequence[int]) -> None:
        """In the background: waits for the commit, then deletes what is not kept of it and the steps `before` it.

        Nothing is listed again: in a bucket that takes a request for each checkpoint.
        """
        assert self._writer is not None
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            self._fail(step, error)
            return
        self._saved = True
        if self._keep is None or not _is_main():
            return
        try:
            steps = [*before, step]
            for old in sorted(set(steps) - set(self._keep(steps, {known: self._metrics_of(known) for known in steps}))):
                self._delete(old)
        except (OSError, UserError) as error:
            self._on_fault(f"{self.directory}: old checkpoints could not be deleted ({one_line(error)})")

    def _fail(self, step: int, error: BaseException) -> None:
        self._saved = False
        self._drain()
        self._remove_failed()
        newest: object = "unknown"
        with contextlib.suppress(OSError, UserError):
            newest = self.latest()
        self._on_fault(
            f"checkpoint {self._path(step)} could not be saved ({one_line(error)}); the run goes on, its newest "
            f"checkpoint is {newest}; free disk space or check the directory"
        )

    def _drain(self) -> None:
        """Waits for what else of a failed save is under way, and drops its errors.

        Orbax keeps those of several parts and raises one at each wait: the next save would fail by an old error. There
        are few parts, and an error that stays must not hold the run for ever.
        """
        assert self._writer is not None
        for _ in range(_MOST_PARTS):
            with contextlib.suppress(Exception):
                return self._writer.wait_until_finished()

    def _remove_failed(self) -> None:
        """Removes what a failed save has left. Again before the next one and at the end: TensorStore may write on for
        a while after it failed, which also makes removing fail."""
        if not self._saved and _is_main():
            with contextlib.suppress(OSError, UserError):
                self._clean_up()

    def _clean_up(self) -> None:
        """Removes what a killed or failed save or deletion has left."""
        for name in paths.list_names(self.directory):
            step, _, rest = name.partition(".")
            unfinished = f".{rest}".startswith((_TEMPORARY, _DELETING))
            if paths.is_remote(self.directory) and not rest:
                unfinished = not paths.exists(paths.join(self.directory, name, COMMITTED))
            if step.isdigit() and unfinished:
                paths.remove_tree(paths.join(self.directory, name))

    def _delete(self, step: int) -> None:
        """First makes the step no checkpoint any more, so that a kill halfway leaves nothing that looks like one."""
        if paths.is_remote(self.directory):
            paths.remove_tree(self._path(step, COMMITTED))
            paths.remove_tree(self._path(step))
        else:
            paths.rename(self._path(step), self._path(step) + _DELETING)
            paths.remove_tree(self._path(step) + _DELETING)
        self._metrics.pop(step, None)

    def _metrics_of(self, step: int) -> dict[str, float]:
        if step not in self._metrics:
            try:
                self._metrics[step] = self._read_metrics(step)
            except UserError:
                self._metrics[step] = {}
        return self._metrics[step]

    def _read_metrics(self, step: int) -> dict[str, float]:
        later = self._path(step, _EVALUATION)
        return paths.read_json(later) if paths.exists(later) else read_metadata(self._path(step))["metrics"]


def _cut(arrays: Mapping[str, Any], axes: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
    """How Orbax cuts large arrays into chunks: layer by layer where there are layers, and to CHUNK_BYTES.

    It cuts by divisors, the largest dim first: one that has few would fall apart into single rows, and stays whole.
    """

    def chunks(path: str, array: Any) -> ocp.SaveArgs:
        if array.nbytes <= CHUNK_BYTES:
            return ocp.SaveArgs()
        layers = list(axes.get(path) or ())[:1] == ["layers"]
        limit = CHUNK_BYTES if max(array.shape[layers:]) % 64 == 0 else None
        return ocp.SaveArgs(chunk_byte_size=limit, shard_axes=(0,) if layers else ())

    return tree.unflatten({path: chunks(path, array) for path, array in arrays.items()})


def _is_main() -> bool:
    return jax.process_index() == 0


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _same_everywhere(steps: list[int]) -> list[int]:
    """What process 0 sees: a listing may lag behind on another host. Only the newest steps matter."""
    if jax.process_count() == 1:
        return steps
    row = np.full(64, -1, np.int32)
    newest = steps[-len(row) :]
    row[: len(newest)] = newest
    return [int(step) for step in multihost_utils.broadcast_one_to_all(row) if step >= 0]
