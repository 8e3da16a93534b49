"""A child process for test_reading.py: restores a checkpoint of float32 arrays as bfloat16 and prints megabytes.

Usage: python reader.py CHECKPOINT GROUP_BYTES. Prints by how much the resident set grew at its highest.
"""

import os
import pathlib
import re
import sys


def _status(name: str) -> int:
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) // 1024


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from t5x_like.storage.model_directory import read_metadata
    from t5x_like.storage.reading import restore

    checkpoint, group_bytes = sys.argv[1], int(sys.argv[2])
    arrays = read_metadata(checkpoint)["arrays"]["params"]
    wanted = {path: jax.ShapeDtypeStruct(tuple(record["shape"]), jnp.bfloat16) for path, record in arrays.items()}
    restore(checkpoint, {"params": {"small": wanted.pop("small")}})  # what any restore needs is loaded
    before = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    restored = restore(checkpoint, {"params": wanted}, group_bytes=group_bytes)
    print(_status("VmHWM") - before, flush=True)
    assert all(float(leaf[0, 0]) == 1 for leaf in jax.tree.leaves(restored))
