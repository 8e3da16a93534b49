"""One process of a tiny sharded loop under Faults, started by test_faults.py. No model: it compiles in a moment.

Arguments: process id, process count, coordinator, log file, what to do. Steps are printed to the file LOG.steps,
since gloo writes into stdout.
"""

import contextlib
import dataclasses
import sys
import time

from t5x_like.core import environment

CONFIG = environment.RuntimeConfig(
    platform="cpu",
    threads=1,
    fake_devices=2,
    compiler_options=environment.CompilerOptions(cpu={}, gpu={}, tpu={}),
    heartbeat_seconds=12,
    shutdown_seconds=10,
    phase_seconds=environment.PhaseSeconds(start=60, compile=60, step=60, evaluate=60, save=60),
    compilation_cache="auto",
    compilation_cache_bytes=0,
)


def main() -> int:
    index, count, coordinator, log, action = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
    config = CONFIG
    if action.startswith("stall") or action == "short":
        config = dataclasses.replace(
            config, phase_seconds=dataclasses.replace(config.phase_seconds, step=3 if action == "short" else 4)
        )
    environment.apply(config)

    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from t5x_like.parallel import multihost
    from t5x_like.training.faults import Faults

    if count > 1:
        processes = multihost.start(config, coordinator=coordinator, process_id=index, num_processes=count)
    else:
        processes = multihost.start(config)
    with Faults(config, log_path=log, processes=processes) as faults, open(log + ".steps", "w") as steps:
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        x_B = jax.make_array_from_callback((8,), sharding, lambda index: np.ones(8, np.float32)[index])
        update = jax.jit(lambda x: x * 0.5 + x.sum() / 100)
        with faults.phase("compile"):
            x_B = jax.block_until_ready(update(x_B))
            if action == "compile":
                print("compiling", file=steps, flush=True)
                time.sleep(60)
        for step in range(1, 3000):
            faults.enter("step")
            x_B = jax.block_until_ready(update(x_B))
            print(step, file=steps, flush=True)
            if faults.should_stop(step):
                if action == "slow_save":
                    print("saving", file=steps, flush=True)
                    time.sleep(60)
                print("saved", file=steps, flush=True)
                return 75
            if step == 20:
                act(action, index)
            time.sleep(0.02)
    return 0


def act(action: str, index: int) -> None:
    with contextlib.suppress(ValueError):
        if int(action.partition(":")[2]) != index:
            return
    if action.startswith("raise"):
        raise ValueError("boom")
    if action in ("stall", "stall:0") and index == int(action == "stall"):
        time.sleep(60)


if __name__ == "__main__":
    sys.exit(main())
