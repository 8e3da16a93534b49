"""What a conversion wrote: the leaves of a model directory as whole arrays."""

import pathlib

import numpy as np

from t5x_like.storage import streams


def leaves(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Path -> array of the parameters of a converted model."""
    found = streams.read_item(str(folder / "checkpoints" / "0"), "params")
    return {path: leaf.read(tuple((0, size) for size in leaf.shape)) for path, leaf in found.items()}
