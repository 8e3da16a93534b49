"""One of two processes for the tests of storage, 2 fake devices each: pair.py PORT INDEX COUNT DIRECTORY TASK SAID

`save` saves the steps 1 to 3, keeping two, and checks what `wait` says. `restore` says the step that was restored and
checks an array that is spread over all devices, then saves step 9. What is said goes to the file SAID: Gloo prints to
the standard streams, in pieces.
"""

import sys

if __name__ == "__main__":
    port, index, count, directory, task, said = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7]
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index, initialization_timeout=60)
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from t5x_like.storage.checkpoint import Checkpoints

    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
    spread, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())

    def state(step):
        values = np.random.default_rng(step).standard_normal((8, 512), dtype=np.float32)
        return {
            "w": jax.make_array_from_callback(values.shape, spread, lambda place: values[place]),
            "step": jax.make_array_from_callback((), whole, lambda place: np.int32(step)),
        }

    def say(line):
        with open(said, "a") as file:
            file.write(line + "\n")

    with Checkpoints(
        directory, keep=lambda steps, metrics: steps[-2:], timeout_seconds=60, on_fault=say
    ) as checkpoints:
        if task == "save":
            for step in (1, 2, 3):
                checkpoints.save(step, {"params": state(step)}, {})
            say(f"saved {checkpoints.wait()}")
        else:
            template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
            step, items = checkpoints.restore_latest({"params": template})
            say(f"restored {step} {int(items['params']['step'])}")
            for shard in items["params"]["w"].addressable_shards:
                expected = np.random.default_rng(step).standard_normal((8, 512), dtype=np.float32)[shard.index]
                assert np.array_equal(shard.data, expected)
            say(f"saved {checkpoints.save(9, {'params': state(9)}, {}) and checkpoints.wait()}")
