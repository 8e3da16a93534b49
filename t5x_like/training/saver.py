"""Between the train state and checkpoints on disk: which trees become which items, and back. Writes no bytes itself.

A checkpoint holds whole models: `params` (and `ema`) join trained and frozen parameters, so that reading a model
reads one item and needs no optimizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.storage import model_directory
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.reading import restore
from t5x_like.training.state import Layout, State

# Item of a checkpoint -> part of the train state.
ITEMS = {"params": "params", "optimizer": "optimizer", "ema": "ema", "state": "progress"}
_MODELS = ("params", "ema")


class Saver:
    """Saves and restores one run; `metadata` (config, provenance) goes into every checkpoint."""

    def __init__(self, checkpoints: Checkpoints, *, layout: Layout, metadata: Mapping[str, Any]):
        self._checkpoints, self._layout = checkpoints, layout
        axes = _items(layout.axes, layout.frozen_axes["base"])
        self._metadata = {**metadata, "axes": {name: _listed(item) for name, item in axes.items()}}

    def save(self, step: int, state: State, frozen: Mapping[str, Any], evaluation: Mapping[str, float]) -> None:
        """Begins to save; returns when the state may be donated. A failure is logged by Checkpoints, and survived."""
        self._checkpoints.save(step, _items(state, frozen["base"]), self._metadata, metrics=evaluation)

    def judge(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Notes what a checkpoint that was saved before its evaluation, by a preemption, is worth."""
        self._checkpoints.judge(step, evaluation)

    def wait(self) -> None:
        """Waits for the last save. Raises UserError if it failed: a run must not end well without its result."""
        if not self._checkpoints.wait():
            raise UserError(
                f"the last checkpoint could not be saved in {self._checkpoints.directory}; free disk space or check "
                "the directory, then start again: the run resumes from the checkpoint before"
            )

    def restore(self) -> tuple[int, State, dict[str, Any], dict[str, float]] | None:
        """(updates done, state, frozen, evaluation) of the newest sound checkpoint, placed as the layout says."""
        found = self._checkpoints.restore_latest(_items(self._layout.state, self._layout.frozen["base"]))
        if found is None:
            return None
        step, items = found
        trained = tree.flatten(self._layout.state["params"]).keys()
        state: State = {ITEMS[name]: item for name, item in items.items()}
        base: dict[str, Any] = {}
        for name in _MODELS:
            if name in state:
                state[name], base = tree.split(state[name], lambda path: path in trained)
        return step, state, {"base": base}, self._checkpoints.metrics(step)


def warm_start(
    state: State,
    frozen: dict[str, Any],
    source: str,
    *,
    select: Sequence[str],
    layout: Layout,
    tokenizer: str,
) -> tuple[State, dict[str, Any], str]:
    """(state, frozen, what happened): parameters whose path matches a regex of `select` come from another run.

    Raises UserError where a chosen parameter is missing there or has another shape, or when it was trained with
    another tokenizer (`tokenizer` is our fingerprint).
    """
    place = model_directory.locate(source)
    metadata = model_directory.read_metadata(place.checkpoint)
    theirs = metadata.get("provenance", {}).get("tokenizer", tokenizer)
    if theirs != tokenizer:
        raise UserError(
            f"config.checkpoint.init_from={source} was trained with another tokenizer ({theirs[:12]}, here "
            f"{tokenizer[:12]}); set config.data.tokenizer={place.tokenizer}"
        )
    templates = tree.join(layout.state["params"], layout.frozen["base"])
    rules = [(pattern, True) for pattern in select]
    chosen = tree.match_rules([*rules, (".*", False)], tree.flatten(templates), where="config.checkpoint.init_select")
    taken, _ = tree.split(templates, lambda path: chosen[path])
    new = tree.flatten(restore(place.checkpoint, {"params": taken})["params"])
    params = tree.map_with_path(lambda path, leaf: new.get(path, leaf), state["params"])
    base = tree.map_with_path(lambda path, leaf: new.get(path, leaf), frozen["base"])
    started = state | {"params": params} | ({"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {})
    origin = f"{len(new)} of {len(chosen)} parameters of {source} at step {metadata['step']}"
    return started, {**frozen, "base": base}, origin


def _items(state: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    items = {name: state[part] for name, part in ITEMS.items() if part in state}
    return {name: tree.join(item, base) if name in _MODELS else item for name, item in items.items()}


def _listed(axes: Mapping[str, Any]) -> dict[str, list[str | None]]:
    return {path: list(names) for path, names in tree.leaves(axes)}
