"""A child process for the tests: saves step after step without rest, until it is killed. Prints each step it began.

Usage: python saver.py DIRECTORY FIRST_STEP
"""

import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", 2)
    from t5x_like.storage.checkpoint import Checkpoints

    checkpoints = Checkpoints(sys.argv[1], keep=lambda steps, metrics: steps[-2:])
    for step in range(int(sys.argv[2]), 1_000_000):
        state = {name: jnp.full((256, 512), float(step)) + jnp.arange(512.0)[None] for name in ("a", "b")}
        checkpoints.save(step, {"params": state}, {})
        print(step, flush=True)
