"""The train step: the only place with `value_and_grad`, for every objective, family and mesh.

Weights of all terms are summed over the whole batch first; micro-batches then simply add (see objectives/interface).
Whether an update is refused (not finite, a spike, nothing to learn from) is decided here, inside the jitted
function: step number, data and schedule advance, parameters and optimizer state do not.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.core import tree
from t5x_like.core.types import Axes, Tree
from t5x_like.objectives.interface import Batch, Objective, Sums
from t5x_like.optim.clip import clip_by_global_norm
from t5x_like.optim.optimizers import Optimizer
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import constrain, use_rules
from t5x_like.training.state import State

Metrics = dict[str, jax.Array]
StepFunction = Callable[[State, dict[str, Any], Batch], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How one update is made.

    micro_batches: parts of the batch whose gradients are added one after the other
    clip_norm: limit of the global gradient norm, None for none
    ema_decay: decay of the running average of parameters, None for none
    spike_deviations: an update whose loss (`Objective.judge`) is this many standard deviations above its running mean
      is a spike;
      None for no test, `spike_memory` is the decay of the running statistics, `spike_warmup` the losses they need
    dropout: whether keys are handed to the model, for dropout or for stochastic rounding
    """

    micro_batches: int
    clip_norm: float | None
    ema_decay: float | None
    spike_deviations: float | None
    spike_memory: float
    spike_warmup: int
    dropout: bool
    seed: int


def make_step(
    objective: Objective, optimizer: Optimizer, *, rules: Rules, param_axes: Tree, config: StepConfig
) -> StepFunction:
    """`step(state, frozen, batch) -> (state, metrics)`, pure and ready for jit. The batch holds `objective.inputs`.

    Each gradient is laid out as its parameter, whose logical axes `param_axes` holds.
    """

    def gradients(params: Tree, frozen: dict[str, Any], batch: Batch, step: jax.Array) -> tuple[Tree, Sums, jax.Array]:
        totals = objective.weights(batch)
        safe_totals = jax.tree.map(lambda total: jnp.where(total > 0, total, 1.0), totals)
        nothing = jnp.all(jnp.stack([total == 0 for total in jax.tree.leaves(totals)]))
        # One stream per purpose: (seed, step, micro-batch); the model folds in layer and site.
        step_key = jax.random.fold_in(jax.random.key(config.seed), step) if config.dropout else None
        differentiate = jax.value_and_grad(_named(objective.loss), has_aux=True)

        def part(micro: Batch, index: jax.Array | int) -> tuple[Tree, Sums]:
            key = None if step_key is None else jax.random.fold_in(step_key, index)
            (_, sums), grads = differentiate(params, frozen, micro, key, safe_totals)
            return tree.map_with_path(lambda _, grad, axes: constrain(grad, *axes), grads, param_axes), sums

        if config.micro_batches == 1:
            grads, sums = part(batch, 0)
        else:
            axes = {name: spec.axes for name, spec in objective.inputs.items()}
            grads, sums = _accumulate(part, batch, axes, config.micro_batches)
        return grads, sums, nothing

    def step(state: State, frozen: dict[str, Any], batch: Batch) -> tuple[State, Metrics]:
        with use_rules(rules):
            params, progress = state["params"], state["progress"]
            grads, sums, nothing = gradients(params, frozen, batch, progress["step"])
            with jax.named_scope("optimizer"):
                grads, grad_norm = clip_by_global_norm(optimizer.mask(grads), config.clip_norm)
                metrics = {name: value / jnp.maximum(weight, 1e-9) for name, (value, weight) in sums.items()}
                judged = metrics[objective.judge]
                spike = _is_spike(judged, progress, config)
                finite = jnp.isfinite(judged) & jnp.isfinite(grad_norm)
                accept = finite & ~spike & ~nothing

                updates, optimizer_state = optimizer.update(grads, state["optimizer"], params, progress["step"])
                changed: State = {
                    "params": jax.tree.map(lambda param, update: (param + update).astype(param.dtype), params, updates),
                    "optimizer": optimizer_state,
                }
                if config.ema_decay is not None:
                    changed["ema"] = _average(state["ema"], changed["params"], config.ema_decay)
                kept = {name: _select(accept, changed[name], state[name]) for name in changed}
                kept["progress"] = _advance(progress, judged, accept, config)
                metrics |= {
                    "grad_norm": grad_norm,
                    "learning_rate": optimizer.learning_rate(progress["step"]),
                    "skipped": 1.0 - accept.astype(jnp.float32),
                    "finite": finite.astype(jnp.float32),
                    "spike": spike.astype(jnp.float32),
                }
            return kept, metrics

    return step


def _named(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss under a name: what of it stands in no scope of the model is the loss's own (planner/time/regions.py)."""

    def named(*arguments: Any) -> Any:
        with jax.named_scope("loss"):
            return loss(*arguments)

    return named


def _accumulate(
    part: Callable[[Batch, jax.Array], tuple[Tree, Sums]], batch: Batch, axes: Mapping[str, Axes], parts: int
) -> tuple[Tree, Sums]:
    """Sums over micro-batches, in float32 at least. Each takes every `parts`-th row, so that no row leaves its data
    shard."""

    def divide(name: str, x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return constrain(x, None, *axes[name])

    micro_batches = {name: divide(name, x) for name, x in batch.items()}

    def add(total: tuple[Tree, Sums], xs: tuple[Batch, jax.Array]) -> tuple[tuple[Tree, Sums], None]:
        return jax.tree.map(jnp.add, total, part(*xs)), None

    first = {name: x[0] for name, x in micro_batches.items()}
    # In bfloat16, the type of gradients of bfloat16 parameters, later parts would be rounded away.
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), jax.eval_shape(part, first, 0)
    )
    total, _ = jax.lax.scan(add, zeros, (micro_batches, jnp.arange(parts)))
    return total


def _is_spike(loss: jax.Array, progress: dict[str, jax.Array], config: StepConfig) -> jax.Array:
    if config.spike_deviations is None:
        return jnp.zeros((), bool)
    limit = progress["loss_mean"] + config.spike_deviations * jnp.sqrt(progress["loss_variance"])
    return (progress["loss_count"] >= config.spike_warmup) & (loss > limit)


def _advance(
    progress: dict[str, jax.Array], loss: jax.Array, accept: jax.Array, config: StepConfig
) -> dict[str, jax.Array]:
    """Step and loss statistics after this update; a refused loss does not enter the statistics."""
    count = progress["loss_count"]
    # The plain mean at first, then an exponential one.
    decay = jnp.minimum(config.spike_memory, count / (count + 1.0))
    deviation = loss - progress["loss_mean"]
    statistics = {
        "loss_mean": progress["loss_mean"] + (1 - decay) * deviation,
        "loss_variance": decay * (progress["loss_variance"] + (1 - decay) * jnp.square(deviation)),
        "loss_count": count + 1,
    }
    old = {name: progress[name] for name in statistics}
    return _select(accept, statistics, old) | {
        "step": progress["step"] + 1,
        "skipped": progress["skipped"] + jnp.where(accept, 0, 1),
    }


def _average(average: Tree, params: Tree, decay: float) -> Tree:
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)


def _select(accept: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda one, other: jnp.where(accept, one, other), new, old)
