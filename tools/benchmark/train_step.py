"""One training step of a run, ours and torch's, for the measurements that time it."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tools.benchmark import timing


def ours(config: Any, arrays: Mapping[str, np.ndarray], steps: int) -> dict[str, Any]:
    """The step that `t5x_like train` runs, on a batch of these arrays; what is not among them is all ones."""
    import jax

    from t5x_like.core import config as bridge
    from t5x_like.core import environment
    from t5x_like.parallel import mesh as meshes
    from t5x_like.runs import program as programs
    from t5x_like.runs import train

    environment.apply(bridge.build(environment.RuntimeConfig, config.runtime, path="config.runtime"))
    experiment = train.from_config(config)
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        state, frozen = programs.initialize(program, seed=0)
        batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in program.batch.items()}
        for name, leaf in batch.items():
            if name.endswith("positions"):
                batch[name] = np.broadcast_to(np.arange(leaf.shape[1], dtype=leaf.dtype), leaf.shape)
        batch |= {name: value.astype(batch[name].dtype) for name, value in arrays.items()}
        placed = {name: jax.device_put(value, program.batch[name].sharding) for name, value in batch.items()}
        step_memory = program.step.lower(state, frozen, placed).compile().memory_analysis()
        memory = {
            "gradients": sum(
                leaf.nbytes for leaf in jax.tree.leaves(state["params"])
            ),  # each as large as its parameter
            "optimizer": sum(leaf.nbytes for leaf in jax.tree.leaves(state["optimizer"])),
            "temporaries": step_memory.temp_size_in_bytes,
        }
        carry = [state]
        losses = []

        def step() -> None:
            carry[0], metrics = program.step(carry[0], frozen, placed)
            losses.append(float(metrics["loss"]))

        begin = time.perf_counter()
        step()
        first = time.perf_counter() - begin
        flops = program.model.flops_per_token(config.data.length, config.data.encoder_length).train
        return {
            "seconds": timing.seconds(step, steps),
            "first": first,
            "loss": losses[0],
            **memory,
            "flops": flops * config.data.batch_size * config.data.length,
        }


def in_torch(model: Any, loss: Callable[[], Any], steps: int) -> dict[str, Any]:
    """The same with torch's AdamW and clipping; loss(): of one forward pass."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-6, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    losses = []

    def step() -> None:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())

    return {"seconds": timing.seconds(step, steps, warmup=3), "loss": losses[0]}
