"""The batches of a run that learns from its own answers: one iteration after the other, within the loop of training.

    prompts (a function of the iteration alone) -> answers -> rewards -> advantages
      -> log-probabilities of the policy as it is, if more than one update follows, and of the reference
      -> epochs x answers / batch_size updates

An iteration begins with the batch of its first update. What its updates read stands in buffers of a fixed shape, which
every checkpoint holds: a run that is killed between two updates goes on with the same answers.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_like.data.read.permutation import permute
from t5x_like.objectives.interface import Batch, Sums
from t5x_like.parallel.sharding import replicated
from t5x_like.rl.advantages import advantages, spread
from t5x_like.rl.config import RlConfig
from t5x_like.rl.prompts import Encoder, Prompts, Text
from t5x_like.rl.rewards import Rewards, Sample
from t5x_like.rl.rollout import Rollout, rollout_batch
from t5x_like.rl.rows import OneARow, RowShape, SeveralARow, text_arrays
from t5x_like.training.state import State

Buffers = dict[str, np.ndarray]
Share = Callable[[str, Any], Any]  # (a name that is used once, a value of process 0) -> that value on every process


@dataclasses.dataclass(frozen=True)
class Programs:
    """What runs on the devices, compiled. reference: None where no reference is read."""

    mesh: Mesh
    sample: Rollout  # run is compiled, as below
    answer: Rollout  # greedily
    score: Any
    reference: Any
    reward: Any  # of the reward model: (params, frozen, batch) -> [rows]; None without one
    batch: Mapping[str, jax.ShapeDtypeStruct]  # of the train step
    scored: Mapping[str, jax.ShapeDtypeStruct]  # of `score` and `reference`
    judged: Mapping[str, jax.ShapeDtypeStruct]  # of `reward`


@dataclasses.dataclass(frozen=True)
class Around:
    """What an iteration asks of the run around it. progress: called between parts, so that a watchdog sees them."""

    timed: Callable[[str], contextlib.AbstractContextManager[None]]
    progress: Callable[[], None]
    share: Share


class Iterations:
    """The source of batches for training/loop.py."""

    def __init__(
        self,
        config: RlConfig,
        programs: Programs,
        prompts: Prompts,
        encoder: Encoder,
        rewards: Rewards,
        *,
        rows: RowShape,
        seed: int,
        around: Around,
    ):
        self._config, self._programs, self._prompts, self._encoder = config, programs, prompts, encoder
        self._rewards, self._rows, self._seed, self._around = rewards, rows, seed, around
        self._batch_size = programs.batch["inputs"].shape[0] * config.answers_per_row  # answers
        self._buffers, self._evaluated = empty(config, rewards.names), 0
        self.updates = config.epochs * config.answers // self._batch_size

    # What the loop calls.

    def batch(self, step: int, state: State, frozen: Mapping[str, Any]) -> Batch:
        """The batch of update `step` + 1; at the begin of an iteration its answers are drawn first, and wherever the
        buffers do not hold them."""
        iteration, update = divmod(step, self.updates)
        if update == 0 or int(self._buffers["iteration"]) != iteration:
            self._buffers = self._collect(iteration, state["params"], frozen)
        return self._place(self._update(iteration, update), self._programs.batch)

    def values(self) -> dict[str, float]:
        """Of the answers that the last batch is from, for the row of its update."""
        buffers, config = self._buffers, self._config
        total = self._rewards.total(buffers["rewards"])
        stopped = buffers["stopped"] > 0
        groups = total.reshape(config.prompts, config.samples)
        advantage = advantages(groups, config.advantage)
        found = {
            "reward": float(total.mean()),
            "reward_std": float(total.std()),
            "reward_std_in_groups": float(groups.std(axis=1).mean()),
            "advantage_std": float(advantage.std()),
            "advantage_min": float(advantage.min()),
            "advantage_max": float(advantage.max()),
            "length_mean": float(buffers["lengths"].mean()),
            "length_min": float(buffers["lengths"].min()),
            "length_max": float(buffers["lengths"].max()),
            "stopped_by_length": float((~stopped).mean()),
            "groups_without_spread": float((~spread(groups)).mean()),
        }
        if stopped.any():
            found["stopped_length_mean"] = float(buffers["lengths"][stopped].mean())
        for part, name in enumerate(self._rewards.names):
            found[f"reward/{name}"] = float(buffers["rewards"][part].mean(dtype=np.float64))
            found[f"reward_std/{name}"] = float(buffers["rewards"][part].std(dtype=np.float64))
            found[f"reward_failures/{name}"] = float(buffers["failed"][part].sum())
        return found

    def items(self) -> dict[str, Any]:
        """What a checkpoint holds of it: {"rollouts": the buffers as arrays that lie on every device}."""
        return {"rollouts": {name: self._replicated(array) for name, array in self._buffers.items()}}

    def restore(self, rollouts: Mapping[str, Any]) -> None:
        """Goes on with buffers from a checkpoint."""
        self._buffers = {name: np.array(rollouts[name]) for name in self._buffers}

    # One iteration.

    def texts(self, iteration: int) -> list[Text]:
        first = iteration * self._config.prompts
        return [self._prompts.at(index) for index in range(first, first + self._config.prompts)]

    def _ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """Of the prompt of each answer: `samples` times that of each text."""
        return [ids for text in texts for ids in [self._encoder.ids(text)] * self._config.samples]

    def _collect(self, iteration: int, params: Any, frozen: Any) -> Buffers:
        config, texts = self._config, self.texts(iteration)
        ids = self._ids(texts)
        with self._around.timed("rollout"):
            prompt, sample = np.divmod(np.arange(config.answers), config.samples)
            drawn = self._draw(self._programs.sample, ids, prompt, sample, iteration, params, frozen)
        buffers = empty(config, self._rewards.names) | drawn
        buffers["iteration"] = np.array(iteration, np.int32)
        with self._around.timed("reward"):
            asked = [texts[index] for index in prompt.tolist()]
            buffers |= self._judge(
                asked, ids, buffers, f"rollouts/{iteration}", f"iteration {iteration}", params, frozen
            )
        with self._around.timed("scoring"):
            buffers |= self._score(buffers, ids, params, frozen)
        return buffers

    def _draw(
        self, program: Rollout, ids: Sequence[Sequence[int]], prompt, sample, iteration: int, params: Any, frozen: Any
    ) -> Buffers:
        """Answers to all prompts, some rows at a time."""
        size, parts = program.shape.rows, []
        number = jax.device_put(np.array(iteration, np.int32), program.iteration.sharding)
        for first in range(0, len(ids), size):
            here = slice(first, first + size)
            asked = ids[here][:: program.shape.samples]
            batch = rollout_batch(
                asked, program.shape, prompt=prompt[here], sample=sample[here], start=self._rows.start
            )
            placed = self._place(batch, program.batch)
            parts.append(jax.device_get(program.run(params, frozen, placed, number)))
            self._around.progress()
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {"rollout_logp": joined.pop("logp")} | joined

    def _judge(
        self, asked: Sequence[Text], ids: Sequence[Sequence[int]], drawn: Buffers, name: str, where: str, params, frozen
    ) -> Buffers:
        """Verifiers are heard by process 0 alone, since they may differ between two calls; `name` is used once."""
        found = None
        if jax.process_index() == 0:
            answers = decoded(drawn, self._encoder)
            samples = [Sample(text.prompt, answer, text.expected) for text, answer in zip(asked, answers, strict=True)]
            judged = self._rewards.judge(samples, where=where, progress=self._around.progress)
            found = {"rewards": judged.values.tolist(), "failed": judged.failed.tolist()}
        self._around.progress()
        shared = self._around.share(name, found)
        self._around.progress()
        values, failed = np.array(shared["rewards"], np.float32), np.array(shared["failed"], np.int32)
        if self._programs.reward is not None:
            values[self._rewards.of_model] = self._by_model(ids, drawn, params, frozen)
        return {"rewards": values, "failed": failed}

    def _by_model(self, ids: Sequence[Sequence[int]], drawn: Buffers, params: Any, frozen: Any) -> np.ndarray:
        """What the reward model says of each text, some rows at a time; the last ones are filled up."""
        arrays = text_arrays(ids, drawn["tokens"], drawn["lengths"], self._rows)
        size, parts = self._batch_size, []
        for first in range(0, len(ids), size):
            rows = np.minimum(np.arange(first, first + size), len(ids) - 1)
            batch = self._place({name: array[rows] for name, array in arrays.items()}, self._programs.judged)
            parts.append(jax.device_get(self._programs.reward(params, frozen, batch)))
            self._around.progress()
        return np.concatenate(parts)[: len(ids)]

    def _score(self, buffers: Buffers, ids: Sequence[Sequence[int]], params: Any, frozen: Any) -> Buffers:
        """What is not read by any update stays 0: the old log-probabilities where there is one update alone."""
        wanted = {"old_logp": self._programs.score} if self.updates > 1 else {}
        if self._programs.reference is not None:
            wanted["reference_logp"] = self._programs.reference
        if not wanted:
            return {}
        found: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        for first in range(0, len(ids), self._batch_size):
            here = slice(first, first + self._batch_size)
            layout = self._layout(ids[here], buffers["lengths"][here])
            batch = self._place(layout.arrays(buffers["tokens"][here]), self._programs.scored)
            for name, program in wanted.items():
                found[name].append(layout.taken(jax.device_get(program(params, frozen, batch))))
            self._around.progress()
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _layout(self, ids: Sequence[Sequence[int]], lengths: np.ndarray) -> OneARow | SeveralARow:
        """Of the rows that hold these answers."""
        most = self._config.new_tokens
        if self._config.answers_per_row == 1:
            return OneARow(ids, lengths, self._rows, most)
        return SeveralARow(ids, lengths, self._config.answers_per_row, self._rows.length + 1 - most, most)

    def _update(self, iteration: int, update: int) -> dict[str, np.ndarray]:
        """The arrays of an update: rows of all answers in an order that is another one in each epoch."""
        config, buffers = self._config, self._buffers
        epoch, part = divmod(update, config.answers // self._batch_size)
        rows, size = config.answers // config.answers_per_row, self._batch_size // config.answers_per_row
        order = permute(np.arange(rows), rows, f"{self._seed}/rollouts/{iteration}/{epoch}")
        first = order[part * size : (part + 1) * size] * config.answers_per_row
        chosen = (first[:, None] + np.arange(config.answers_per_row)).reshape(-1)
        ids = self._ids(self.texts(iteration))
        layout = self._layout([ids[index] for index in chosen], buffers["lengths"][chosen])
        arrays = layout.arrays(buffers["tokens"][chosen])
        if config.truncated == "leave_out":
            arrays["loss_weights"] *= layout.one_each((buffers["stopped"][chosen] > 0).astype(np.float32))[..., None]
        for name in ("old_logp", "reference_logp", "rollout_logp"):
            arrays[name] = layout.placed(buffers[name][chosen])
        total = self._rewards.total(buffers["rewards"]).reshape(config.prompts, config.samples)
        advantage = advantages(total, config.advantage).reshape(-1)[chosen].astype(np.float32)
        arrays["advantages"] = layout.one_each(advantage)
        arrays["on_policy"] = layout.one_each(np.full(len(chosen), float(update == 0), np.float32))
        return arrays

    # Held-out prompts, answered greedily.

    def evaluate(self, params: Any, frozen: Any, batch: Any) -> Sums:
        """Sums over the prompts of a `HeldOut` batch."""
        index, texts = batch
        rows = self._programs.answer.shape.rows
        ids = [self._encoder.ids(text) for text in texts]
        filled = [*ids, *[ids[0]] * (rows - len(ids))]
        zeros = np.zeros(rows, np.int32)
        drawn = self._draw(self._programs.answer, filled, zeros, zeros, 0, params, frozen)
        drawn = {name: array[: len(texts)] for name, array in drawn.items()}
        self._evaluated += 1
        name, where = f"evaluation/{self._evaluated}", f"evaluation, batch {index}"
        judged = self._judge(texts, ids, drawn, name, where, params, frozen)
        count = np.float32(len(texts))
        sums: dict[str, Any] = {"reward": (self._rewards.total(judged["rewards"]).sum(), count)}
        for part, name in enumerate(self._rewards.names):
            sums[f"reward/{name}"] = (judged["rewards"][part].sum(dtype=np.float64), count)
        sums["length_mean"] = (drawn["lengths"].sum(), count)
        sums["stopped_by_length"] = ((drawn["stopped"] == 0).sum(), count)
        return sums

    # Between the host and the devices.

    def _place(self, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Batch:
        """Sharded arrays; every process has made all rows."""
        return {
            name: jax.make_array_from_callback(a.shape, a.sharding, functools.partial(_part, arrays[name]))
            for name, a in wanted.items()
        }

    def _replicated(self, array: np.ndarray) -> jax.Array:
        sharding = replicated(self._programs.mesh)
        return jax.make_array_from_callback(array.shape, sharding, functools.partial(_part, array))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out prompts in batches (number, texts), from the first at each iteration."""

    texts: Sequence[Text]
    rows: int

    def __iter__(self) -> Iterator[tuple[int, Sequence[Text]]]:
        for index, first in enumerate(range(0, len(self.texts), self.rows)):
            yield index, self.texts[first : first + self.rows]


def empty(config: RlConfig, names: Sequence[str]) -> Buffers:
    """The buffers before the first iteration: their shapes and types are those of every checkpoint."""
    answers, new, parts = config.answers, config.new_tokens, len(names)
    return {
        "iteration": np.array(-1, np.int32),
        "tokens": np.zeros((answers, new), np.int32),
        "lengths": np.zeros(answers, np.int32),
        "stopped": np.zeros(answers, np.int32),
        "rollout_logp": np.zeros((answers, new), np.float32),
        "old_logp": np.zeros((answers, new), np.float32),
        "reference_logp": np.zeros((answers, new), np.float32),
        "rewards": np.zeros((parts, answers), np.float32),
        "failed": np.zeros((parts, answers), np.int32),
    }


def decoded(buffers: Mapping[str, np.ndarray], encoder: Encoder) -> list[str]:
    """The texts of answers, without their end tokens."""
    counts = buffers["lengths"] - (buffers["stopped"] > 0)
    return [
        encoder.vocabulary.decode(tokens[:count].tolist())
        for tokens, count in zip(buffers["tokens"], counts.tolist(), strict=True)
    ]


def _part(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]
