"""Of the mesh: what the preset decides is None here (t5x_like/parallel/mesh.py)."""

from ml_collections.config_dict import placeholder


def mesh() -> dict:
    axes = ("slice", "stage", "data", "fsdp", "expert", "sequence", "tensor")
    sizes = {axis: placeholder(int) for axis in axes}
    pipeline = {"micro_batches": placeholder(int), "repeats": 1}
    return {"preset": "fsdp", "rules": "", **sizes, "pipeline": pipeline}
