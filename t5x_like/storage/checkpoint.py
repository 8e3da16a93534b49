"""Checkpoints of a run: saved in the background, whole or not at all, verified when read. Built on Orbax's writer.

Layout: DIRECTORY/STEP/{ITEM/, metadata/}. An item is a tree of arrays; `metadata` is one JSON object of the same commit:
what the caller gives (config, axes, provenance) and, added here, `step`, `time`, `arrays` (shape and dtype by item and
path), `kinds`, `fingerprints`, `metrics`, and the sha256 of all that. Nothing in it depends on a mesh.

Orbax's CheckpointManager is not used: it refuses steps below its latest, forgets steps whose deletion never happened
because the save failed, and calls JAX's preemption sync point from its background thread with an old step number.
Which steps are kept is decided by a function that the caller hands in (training/keep.py).
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.storage import leaves, paths
from t5x_like.storage.fingerprint import fingerprints
from t5x_like.storage.quiet import quiet_orbax

METADATA = "metadata"
_FORMAT = 1
_TEMPORARY = ".orbax-checkpoint-tmp"
_CORRUPT = ".corrupt"
_DELETING = ".deleting"
_COMMITTED = "commit_success.txt"
# Such errors say nothing about the bytes of the checkpoint: it must not be put aside for them.
_NOT_DAMAGE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")

Keep = Callable[[Sequence[int], Mapping[int, Mapping[str, float]]], Collection[int]]


class DamagedCheckpoint(UserError):
    """The bytes of a checkpoint are not those that were saved."""


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
        found = [int(name) for name in paths.list_names(self.directory) if name.isascii() and name.isdigit()]
        if paths.is_remote(self.directory):
            found = [step for step in found if paths.exists(self._path(step, _COMMITTED))]
        return sorted(found)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON object saved with a step. Raises DamagedCheckpoint, or UserError where there is no such step."""
        if step not in self.steps():
            raise UserError(f"{self.directory} holds no checkpoint of step {step}; it has {self.steps() or 'none'}")
        where = self._path(step, METADATA, METADATA)
        if not paths.exists(where):
            raise DamagedCheckpoint(f"checkpoint {self._path(step)} is damaged: it has no metadata")
        try:
            content = json.loads(paths.read_bytes(where))
            sound = _digest(content) == content.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError):
            sound = False
        if not sound:
            raise DamagedCheckpoint(f"checkpoint {self._path(step)} is damaged: its metadata is not what was saved")
        return content

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
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is due after {latest}, which {self.directory} already holds")
        flat = {name: leaves.array_paths(item) for name, item in items.items()}
        # A metric that is no number can be no best one, and JSON has no NaN.
        self._metrics[step] = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        note = self._note(step, items, flat, metadata)
        parts: dict[str, Any] = {
            name: ocp.args.PyTreeSave(tree.unflatten(arrays)) for name, arrays in flat.items() if arrays
        }
        parts[METADATA] = ocp.args.JsonSave(note)
        try:
            self._writer.save(epath.Path(self._path(step)), args=ocp.args.Composite(**parts))
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(step, error)
            return False
        self._thread = threading.Thread(target=self._finish, args=(step,), name=f"save-{step}")
        self._thread.start()
        return True if self._asynchronous else self.wait()

    def wait(self) -> bool:
        """Waits for the save in progress. True if the last save that was begun is committed, or none was begun."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._saved

    def restore(self, step: int, templates: Mapping[str, Any]) -> dict[str, Any]:
        """The items named in `templates`: trees of jax.ShapeDtypeStruct, each leaf with the sharding it shall have.

        A template may hold part of an item. A leaf without a sharding goes to the first device; one of another dtype
        than saved is converted after it was verified. Raises UserError for an item, path or shape that the checkpoint
        does not have, DamagedCheckpoint if it cannot be read or a fingerprint differs.
        """
        self.wait()
        note = self.metadata(step)
        result = {}
        for name, template in templates.items():
            wanted = leaves.array_paths(template)
            recorded = note["arrays"].get(name)
            if recorded is None:
                raise UserError(f"{self._path(step)} holds no {name!r}; it has {', '.join(sorted(note['arrays']))}")
            check_templates(wanted, recorded, where=f"{self._path(step)}/{name}")
            arrays = self._read(step, name, wanted, recorded) if wanted else {}
            self._verify(step, name, arrays, note["fingerprints"][name])
            result[name] = leaves.rebuild(
                template, {path: _as_dtype(array, wanted[path].dtype) for path, array in arrays.items()}
            )
        return result

    def restore_latest(self, templates: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """(step, items) of the newest sound checkpoint, None if there is no checkpoint; newer damaged ones are put aside.

        Raises UserError when there are checkpoints and none is sound: a run must not silently begin again.
        """
        damaged: dict[int, str] = {}
        for step in reversed(_same_everywhere(self.steps())):
            try:
                items = self.restore(step, templates)
            except DamagedCheckpoint as error:
                damaged[step] = _one_line(error)
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
                if not isinstance(array, jax.Array | np.ndarray) or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
                    raise TypeError(f"{name}/{path} is no array that can be saved but {type(array).__name__}")
        note = {
            **metadata,
            "format": _FORMAT,
            "step": step,
            "time": round(time.time(), 3),
            "arrays": {
                name: {path: {"shape": list(a.shape), "dtype": np.dtype(a.dtype).name} for path, a in arrays.items()}
                for name, arrays in flat.items()
            },
            "kinds": {name: leaves.kinds(item) for name, item in items.items()},
            "fingerprints": {name: fingerprints(arrays) for name, arrays in flat.items()},
            "metrics": self._metrics[step],
        }
        # Through JSON once, so that what is hashed is what will be read.
        note = json.loads(json.dumps(note, allow_nan=False))
        return {**note, "sha256": _digest(note)}

    def _finish(self, step: int) -> None:
        """In the background: waits for the commit, then deletes what is not kept."""
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
            steps = self.steps()
            for old in sorted(set(steps) - set(self._keep(steps, {known: self._metrics_of(known) for known in steps}))):
                self._delete(old)
        except (OSError, UserError) as error:
            self._on_fault(f"{self.directory}: old checkpoints could not be deleted ({_one_line(error)})")

    def _fail(self, step: int, error: BaseException) -> None:
        self._saved = False
        if _is_main():
            try:
                self._clean_up()
            except (OSError, UserError) as second:
                self._on_fault(f"{self.directory}: cannot be cleaned up ({_one_line(second)})")
        self._on_fault(
            f"checkpoint {self._path(step)} could not be saved ({_one_line(error)}); the run goes on, its newest "
            f"checkpoint is {self.latest()}; free disk space or check the directory"
        )

    def _clean_up(self) -> None:
        """Removes what a killed or failed save or deletion has left."""
        for name in paths.list_names(self.directory):
            step, _, rest = name.partition(".")
            unfinished = f".{rest}".startswith((_TEMPORARY, _DELETING))
            if paths.is_remote(self.directory) and not rest:
                unfinished = not paths.exists(paths.join(self.directory, name, _COMMITTED))
            if step.isdigit() and unfinished:
                paths.remove_tree(paths.join(self.directory, name))

    def _delete(self, step: int) -> None:
        """First makes the step no checkpoint any more, so that a kill halfway leaves nothing that looks like one."""
        if paths.is_remote(self.directory):
            paths.remove_tree(self._path(step, _COMMITTED))
            paths.remove_tree(self._path(step))
        else:
            paths.rename(self._path(step), self._path(step) + _DELETING)
            paths.remove_tree(self._path(step) + _DELETING)
        self._metrics.pop(step, None)

    def _metrics_of(self, step: int) -> dict[str, float]:
        if step not in self._metrics:
            try:
                self._metrics[step] = self.metadata(step)["metrics"]
            except UserError:
                self._metrics[step] = {}
        return self._metrics[step]

    def _read(
        self, step: int, name: str, wanted: Mapping[str, Any], recorded: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, jax.Array]:
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = tree.unflatten(
            {
                path: jax.ShapeDtypeStruct(
                    leaf.shape, np.dtype(recorded[path]["dtype"]), sharding=getattr(leaf, "sharding", None) or default
                )
                for path, leaf in wanted.items()
            }
        )
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        arrays, error = {}, None
        try:
            # The handler itself, not a Checkpointer: that one ends in a barrier, where the others would wait for a
            # process whose part of the data is damaged.
            arrays = tree.flatten(ocp.PyTreeCheckpointHandler().restore(epath.Path(self._path(step, name)), args=arguments))
        except Exception as caught:  # Orbax raises anything, plain Exception included, for bytes it cannot decode
            error = caught.__cause__ or caught
            if isinstance(error, PermissionError) or any(mark in str(error) for mark in _NOT_DAMAGE):
                raise UserError(f"{self._path(step, name)} cannot be read ({_one_line(error)})") from None
        # A flipped bit in its description of the tree makes Orbax skip a leaf and hand back the template.
        if error is None and not all(isinstance(arrays.get(path), jax.Array) for path in wanted):
            error = ValueError("some arrays are missing")
        if not all(_gathered(error is None)):
            reason = _one_line(error) if error is not None else "another process could not read its part"
            raise DamagedCheckpoint(f"checkpoint {self._path(step)} is damaged: {name!r} cannot be read ({reason})")
        return arrays

    def _verify(self, step: int, name: str, arrays: Mapping[str, jax.Array], recorded: Mapping[str, int]) -> None:
        now = fingerprints(arrays)
        wrong = [path for path in now if now[path] != recorded.get(path)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise DamagedCheckpoint(
                f"checkpoint {self._path(step)} is damaged: {name}/{wrong[0]}{more} differs from what was saved"
            )


def check_templates(wanted: Mapping[str, Any], recorded: Mapping[str, Mapping[str, Any]], *, where: str) -> None:
    """Raises UserError, naming paths and shapes, unless every wanted array was recorded with that shape."""
    missing = [path for path in wanted if path not in recorded]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where} has no {missing[0]!r}{more}; it belongs to another model or optimizer")
    other = [path for path, leaf in wanted.items() if list(leaf.shape) != list(recorded[path]["shape"])]
    if other:
        differing = ", ".join(
            f"{path!r} is {list(recorded[path]['shape'])} there and {list(wanted[path].shape)} here" for path in other[:3]
        )
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(f"{where} has other shapes: {differing}{more}; use the config it was made with")


def _digest(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _as_dtype(array: jax.Array, dtype: Any) -> jax.Array:
    return array if array.dtype == dtype else array.astype(dtype)


def _one_line(error: BaseException) -> str:
    """Beginning and end of a long message: TensorStore puts the reason behind several paths, and source lines last."""
    text = " ".join(str(error).partition("[source locations=")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-180:]}"


def _is_main() -> bool:
    return jax.process_index() == 0


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _gathered(value: bool) -> list[bool]:
    """The value of every process, on every process."""
    if jax.process_count() == 1:
        return [value]
    return [bool(other) for other in np.ravel(multihost_utils.process_allgather(np.array(value)))]


def _same_everywhere(steps: list[int]) -> list[int]:
    """What process 0 sees: a listing may lag behind on another host. Only the newest steps matter."""
    if jax.process_count() == 1:
        return steps
    row = np.full(64, -1, np.int32)
    newest = steps[-len(row) :]
    row[: len(newest)] = newest
    return [int(step) for step in multihost_utils.broadcast_one_to_all(row) if step >= 0]
