"""Between the train state and checkpoints on disk: which trees become which items, and back. Writes no bytes itself.

A checkpoint holds whole models: `params` (and `ema`) join trained parameters and those of the base, so that reading a
model reads one item and needs no optimizer. Or it holds the trained part alone (`config.checkpoint.holds`) and names
the checkpoint that the base came from. Frozen roles with a source of their own are never written: a checkpoint names
their sources and a fingerprint of each, and a resume must find the same parameters there.
"""

import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from t5x_like.convert.foreign import is_foreign
from t5x_like.convert.stored import StoredModel
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.peft.attach import has_adapter, is_adapter
from t5x_like.storage import base as bases
from t5x_like.storage import model_directory, paths
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.fingerprint import digest
from t5x_like.training.state import Layout, Parts, State, read_sources

# Item of a checkpoint -> part of the train state. "state": the step, counts and spike statistics. "rollouts": answers
# that updates are still to be made of, which only runs of reinforcement learning have (rl/loop.py).
ITEMS = {"params": "params", "optimizer": "optimizer", "ema": "ema", "state": "progress", "rollouts": "rollouts"}
_MODELS = ("params", "ema")


class Saver:
    """Saves and restores one run; `metadata` (config, provenance) goes into every checkpoint. among: directories in
    which the base of a trained part is looked for first. cached: by role, source and fingerprint of models that only
    the token cache was made with."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        parts: Parts,
        layout: Layout,
        holds: str,
        metadata: Mapping[str, Any],
        among: Sequence[str] = (),
        cached: Mapping[str, Mapping[str, str]] = types.MappingProxyType({}),
    ):
        self._checkpoints, self._parts, self._layout, self._cached = checkpoints, parts, layout, cached
        self._among = tuple(map(paths.normal, among))
        self._apart = holds == "trained" and bool(layout.frozen["base"])
        axes = _items(layout.axes, {} if self._apart else layout.frozen_axes["base"])
        self._metadata = {**metadata, "axes": {name: _listed(item) for name, item in axes.items()}}

    def save(self, step: int, state: State, frozen: Mapping[str, Any], evaluation: Mapping[str, float]) -> None:
        """Begins to save; returns when the state may be donated. A failure is logged by Checkpoints, and survived."""
        if self._apart and "base" not in self._metadata:
            raise ValueError("the base of these checkpoints was not named")
        if "roles" not in self._metadata:
            self._metadata["roles"] = self._sources(frozen)
        items = _items(state, {} if self._apart else frozen["base"])
        self._checkpoints.save(step, items, self._metadata, metrics=evaluation)

    def begin(self, source: str | None, taken: Collection[str]) -> None:
        """Told once at a fresh start: the parameters `taken` (paths) are those of the model in `source`.

        Raises UsageError where checkpoints of the trained part would have no base to name.
        """
        if not self._apart:
            return
        base = tree.flatten(self._layout.frozen["base"])
        missing = sorted(base.keys() - set(taken))
        if source is None or missing:
            raise UsageError(
                "config.checkpoint.holds='trained' needs config.checkpoint.init_from and an init_select that takes all "
                f"frozen parameters; {missing[0]!r} would be drawn at random and never saved"
            )
        if is_foreign(source):
            raise UsageError(
                f"config.checkpoint.holds='trained' needs a base in our own form, and {source} is none; convert it by "
                f"`t5x_like convert {source} DIRECTORY` and give that as config.checkpoint.init_from"
            )
        checkpoint = model_directory.locate(source).checkpoint
        if has_adapter(model_directory.read_metadata(checkpoint)["config"]):
            raise UsageError(
                f"config.checkpoint.holds='trained' needs a base that is stored whole, and {source} is an adapter; "
                f"merge it by `t5x_like convert {source} MODEL --to=native` and begin with MODEL, or set holds='model'"
            )
        self._metadata["base"] = self._named(checkpoint)

    def _named(self, checkpoint: str) -> dict[str, str]:
        """What checkpoints say of this base."""
        beside = paths.join(self._checkpoints.directory, "0")  # of whatever step
        return bases.record(checkpoint, tree.flatten(self._layout.frozen["base"]), beside=beside)

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
        found = self._checkpoints.restore_latest(self._templates(), among=self._among)
        if found is None:
            return None
        step, items = found
        where = f"step {step} in {self._checkpoints.directory}"
        checkpoint = paths.join(self._checkpoints.directory, str(step))
        state, frozen = self._adopt(items, self._checkpoints.metadata(step), checkpoint, where=where)
        return step, state, frozen, self._checkpoints.metrics(step)

    def branch(self, checkpoint: str) -> tuple[int, State, dict[str, Any], dict[str, float]]:
        """As `restore`, from the path of a checkpoint of another run, which is only read.

        Raises UserError, in one line, if it is damaged or holds another model or optimizer.
        """
        note = model_directory.read_metadata(checkpoint)
        templates = self._templates()
        absent = [name for name in templates if name not in note["arrays"]]
        if absent:
            raise UserError(
                f"config.checkpoint.branch_from: {checkpoint} holds no {absent[0]!r}, so that training cannot go on "
                "from it; begin with its parameters alone by config.checkpoint.init_from"
            )
        items = bases.restore_items(checkpoint, templates, among=self._among)
        state, frozen = self._adopt(items, note, checkpoint, where=checkpoint)
        return note["step"], state, frozen, note["metrics"]

    def _templates(self) -> dict[str, Any]:
        templates = _items(self._layout.state, self._layout.frozen["base"])
        if "ema" in templates:
            templates["ema"] = self._layout.state["ema"]  # its frozen parameters are those of `params`
        return templates

    def _adopt(
        self, items: Mapping[str, Any], note: Mapping[str, Any], checkpoint: str, *, where: str
    ) -> tuple[State, dict[str, Any]]:
        """(state, frozen) of the items of a checkpoint with this metadata, whose base and roles it goes on naming.
        where: what errors call it."""
        if self._apart and "base" not in note:
            raise UsageError(
                f"config.checkpoint.holds='trained', but {where} holds the whole model and names no base; go on with "
                "'model'"
            )
        if self._apart:
            wanted = tree.flatten(self._layout.frozen["base"])
            found = bases.located(note["base"], wanted, where=checkpoint, among=self._among)
            self._metadata["base"] = self._named(found)
        trained = tree.flatten(self._layout.state["params"]).keys()
        state: State = {ITEMS[name]: item for name, item in items.items()}
        base: dict[str, Any] = {}
        state["params"], base = tree.split(state["params"], lambda path: path in trained)
        frozen = {"base": base} | read_sources(self._parts, self._layout)
        self._metadata["roles"] = self._sources(frozen)
        check_sources(note.get("roles", {}), self._metadata["roles"], where=where)
        return state, frozen

    def _sources(self, frozen: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """By role: where its parameters were read, and one number for all of them as they are held."""
        sources = {role: part.source for role, part in self._parts.frozen.items() if part.source is not None}
        return {
            role: {"source": source.directory, "fingerprint": digest(tree.flatten(frozen[role]))}
            for role, source in sources.items()
        } | {role: dict(found) for role, found in self._cached.items()}


def take(
    found: StoredModel, source: str, *, select: Sequence[str], layout: Layout, tokenizer: str
) -> tuple[dict[str, jax.Array], str]:
    """(parameters by path, what happened): those whose path matches a regex of `select`, read from another model,
    which was opened from `source`.

    Raises UserError where a chosen parameter is missing there or has another shape, or when it was trained with
    another tokenizer (`tokenizer` is our fingerprint).
    """
    if found.tokenizer is not None and found.tokenizer != tokenizer:
        raise UserError(
            f"config.checkpoint.init_from={source} was trained with another tokenizer ({found.tokenizer[:12]}, here "
            f"{tokenizer[:12]}); set config.data.tokenizer={found.tokenizer_folder}"
        )
    whole = tree.join(layout.state["params"], layout.frozen["base"])
    _, templates = tree.split(whole, is_adapter)  # adapters are new
    rules = [(pattern, True) for pattern in select]
    chosen = tree.match_rules([*rules, (".*", False)], tree.flatten(templates), where="config.checkpoint.init_select")
    # A head that the source lacks (a reward model begins as a language model) is new and drawn.
    known = found.config.scalar_heads
    new_heads = {path for path in chosen if path.startswith("heads/") and path.split("/")[1] not in known}
    taken, _ = tree.split(templates, lambda path: chosen[path] and path not in new_heads)
    new = tree.flatten(found.read(taken))
    at = "" if found.step is None else f" at step {found.step}"
    return new, f"{len(new)} of {len(chosen)} parameters of {source}{at}"


def check_sources(before: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Raises UserError for a role whose parameters are not those that the run had so far."""
    for role, found in now.items():
        known = before.get(role, {"source": "nowhere", "fingerprint": ""})
        if known["fingerprint"] != found["fingerprint"]:
            raise UserError(
                f"config.roles.{role}: {found['source']} now gives other parameters, or another dtype, than this run "
                f"read from {known['source']} up to {where}; give the former ones as config.roles.{role}.source"
            )


def _items(state: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    items = {name: state[part] for name, part in ITEMS.items() if part in state}
    return {name: tree.join(item, base) if name in _MODELS else item for name, item in items.items()}


def _listed(axes: Mapping[str, Any]) -> dict[str, list[str | None]]:
    return {path: list(names) for path, names in tree.leaves(axes)}
