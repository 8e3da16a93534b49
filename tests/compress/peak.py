"""Reads the parameters of a model in int8 and prints bytes: the peak of memory before and after, and what is held.

python peak.py DIRECTORY      a Hugging Face folder or a model directory, in a process of its own
"""

import json
import sys

import jax
import numpy as np

from t5x_like.compress import reading
from t5x_like.convert import native
from t5x_like.convert.stored import open_model
from t5x_like.core import tree
from t5x_like.core.types import ParamSpec
from tests.convert.synthetic import peak_bytes

if __name__ == "__main__":
    model = open_model(sys.argv[1])
    specs = tree.unflatten(native.model_specs(model.config))

    def plain(path: str, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype)

    wanted = reading.templates(specs, tree.map_with_path(plain, specs), lambda path, shape: None)
    jax.numpy.zeros(1).block_until_ready()
    before = peak_bytes()
    arrays = jax.tree.leaves(model.read(wanted))
    held = {
        name: sum(a.nbytes for a in arrays if (a.dtype == np.int8) == (name == "int8")) for name in ("int8", "floats")
    }
    print(json.dumps({"before": before, "peak": peak_bytes(), **held}))
