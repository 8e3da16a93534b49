"""From an amount of compute to a model of a family, and to a run of it on given chips: sizes, batch, mesh, remat.

What the published fits say of a loss stands in planner/sizes/budget.py, numbers of the families in models/families.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from t5x_like.core.config import Values
from t5x_like.core.errors import UsageError, UserError
from t5x_like.layers.remat import POLICIES
from t5x_like.models import config as model_config
from t5x_like.models import flops
from t5x_like.models.config import ModelConfig
from t5x_like.models.families import FAMILIES
from t5x_like.parallel import mesh as meshes
from t5x_like.planner.sizes.footprint import Footprint
from t5x_like.runs.footprint import Footprints
from t5x_like.runs.roles import build_model
from t5x_like.runs.train import Experiment

# Sizes from here on show how a family grows: those of laptops have proportions of their own.
_LEAST_PARAMETERS = 100e6
_WIDTH_STEP = 256  # widths are multiples of it: two tiles of a matrix unit
_MLP_STEP = 256
# What a plan leaves free of a device's memory: layouts and the runtime are in no footprint.
_FREE = 0.15


@dataclasses.dataclass(frozen=True)
class Sized:
    """A model of a family. fields: of config.model, as overrides name them, without `config.model.`.

    parameters: learned numbers, embedding and head included, as the fits count them. train_flops: FLOPs of training for
    a token, attention included.
    """

    name: str
    config: ModelConfig
    fields: Mapping[str, Any]
    parameters: int
    train_flops: float


@dataclasses.dataclass(frozen=True)
class Placed:
    """A run that fits on a mesh. rows: of the global batch; footprint: bytes a device."""

    experiment: Experiment
    sizes: dict[str, int]
    footprint: Footprint


def sized(name: str, section: Values, fields: Mapping[str, Any], *, length: int, source_length: int = 0) -> Sized:
    """The model of a section of a config with these fields. length: tokens of a row, by which attention is counted."""
    config = model_config.resolve(_with(section, fields))
    count = build_model(config, rules="", platform="tpu").parameter_count()
    per_token = flops.per_token(config, length=length, source_length=source_length).train
    return Sized(name, config, fields, count, per_token)


def of_family(family: str, section: Values, *, length: int) -> list[Sized]:
    """The named sizes of a family, the smallest first. UsageError for one that is unknown, or has no decoder alone."""
    if family not in FAMILIES:
        raise UsageError(f"--family={family} is unknown; there are {', '.join(FAMILIES)}")
    if FAMILIES[family][0]["architecture"] != "decoder":
        decoders = [name for name, (fields, _) in FAMILIES.items() if fields["architecture"] == "decoder"]
        raise UsageError(
            f"--family={family} has an encoder, and the published fits are of decoders; use one of "
            f"{', '.join(decoders)}"
        )
    found = [
        sized(size, section, {"family": family, "size": size, "max_length": length}, length=length)
        for size in FAMILIES[family][1]
    ]
    return sorted(found, key=lambda each: each.parameters)


def shaped(family: str, section: Values, target: float, sizes: list[Sized], *, length: int) -> Sized:
    """A model of about `target` parameters with the proportions of a family's published sizes."""
    anchors = [each for each in sizes if each.parameters >= _LEAST_PARAMETERS] or sizes
    near = min(anchors, key=lambda each: abs(math.log(each.parameters / target)))
    guesses = [_shape(width, near, anchors) for width in _widths(near, target)]
    best = min(guesses, key=lambda fields: abs(math.log(_count(fields, near.config) / target)))
    fields = {"family": family, "size": near.name, "max_length": length, **best}
    return sized("own", section, fields, length=length)


def _widths(near: Sized, target: float) -> list[int]:
    """Multiples of a step around that width which the cube of the ratio suggests."""
    middle = near.config.width * (target / near.parameters) ** (1 / 3)
    step = math.lcm(_WIDTH_STEP if middle > 2048 else 128, near.config.stack("decoder").head_size)
    first = max(round(0.6 * middle / step), 1)
    return [step * number for number in range(first, max(round(1.7 * middle / step), first + 1) + 1)]


def _shape(width: int, near: Sized, anchors: list[Sized]) -> dict[str, Any]:
    stack = near.config.stack("decoder")
    heads = max(round(width / stack.head_size), 1)
    kv_heads = heads if stack.kv_heads == stack.heads else math.gcd(heads, stack.kv_heads)
    mlp = max(round(width * stack.mlp / near.config.width / _MLP_STEP), 1) * _MLP_STEP
    return {
        "width": width,
        "decoder.layers": max(round(_layers(width, anchors)), 1),
        "decoder.heads": heads,
        "decoder.kv_heads": kv_heads,
        "decoder.mlp": mlp,
    }


def _layers(width: int, anchors: list[Sized]) -> float:
    """By interpolation between logarithms of widths and depths of the published sizes, beyond the last by its width a
    layer."""
    by_width = sorted({each.config.width: each.config.stack("decoder").layers for each in anchors}.items())
    below = [pair for pair in by_width if pair[0] <= width]
    above = [pair for pair in by_width if pair[0] >= width]
    if not below or not above:
        wide, layers = (below or above)[-1 if below else 0]
        return layers * width / wide
    (low, few), (high, many) = below[-1], above[0]
    if low == high:
        return few
    share = math.log(width / low) / math.log(high / low)
    return math.exp(math.log(few) + share * math.log(many / few))


def _count(fields: Mapping[str, Any], like: ModelConfig) -> float:
    """Parameters but for norms and biases."""
    width, head = fields["width"], like.stack("decoder").head_size
    attention = 2 * width * head * (fields["decoder.heads"] + fields["decoder.kv_heads"])
    mlp = width * fields["decoder.mlp"] * (3 if like.stack("decoder").gated else 2)
    ends = width * like.vocab_size * (1 if like.head.tied else 2)
    return fields["decoder.layers"] * (attention + mlp) + ends


def place(experiment: Experiment, devices: int, hbm_bytes: int, footprints: Footprints) -> Placed:
    """The run with the least tensor parallelism, and then the least remat, that fits these devices by its footprint.

    FSDP takes what tensor parallelism leaves. UserError where nothing fits.
    """
    limit, least = (1 - _FREE) * hbm_bytes, 0
    for tensor in _tensor_sizes(experiment.model, devices):
        # Those with the most micro-batches take the least memory: where these do not fit, no others are asked.
        parts = list(_micro_batches(experiment, devices // tensor))
        for remat in POLICIES if parts else ():
            try:
                smallest = _placed(experiment, devices, footprints, tensor=tensor, remat=remat, parts=parts[-1])
            except UsageError:
                break  # something does not divide
            least = min(least or smallest.footprint.total, smallest.footprint.total)
            if smallest.footprint.total > limit:
                continue
            for count in parts[:-1]:
                found = _placed(experiment, devices, footprints, tensor=tensor, remat=remat, parts=count)
                if found.footprint.total <= limit:
                    return found
            return smallest
    if not least:
        rows = experiment.data.batch_size
        raise UserError(
            f"no mesh of {devices} devices divides {rows} rows of a batch and this model; give other --chips"
        )
    raise UserError(
        f"nothing fits: with full remat and the most micro-batches it takes {least:,} bytes a device by estimate, and "
        f"{limit:,.0f} of {hbm_bytes:,} are planned with; give more --chips, or fewer --days for a smaller model"
    )


def _tensor_sizes(model: ModelConfig, devices: int) -> Iterator[int]:
    stack = model.stack("decoder")
    for tensor in (1, 2, 4, 8):
        if devices % tensor == 0 and stack.heads % tensor == 0 and stack.mlp % tensor == 0:
            yield tensor


def rows_of(wanted: float, devices: int) -> int:
    """Rows of a batch near what is wanted, divided evenly over devices and, where there are many, over micro-batches.

    >>> rows_of(1300, 4), rows_of(7, 4), rows_of(1, 4)
    (1280, 8, 4)
    """
    each = max(wanted / devices, 1)
    unit = 2 ** min(max(math.floor(math.log2(each / 4)), 0), 4)
    return max(round(each / unit), 1) * unit * devices


def _micro_batches(experiment: Experiment, shards: int) -> Iterator[int]:
    """One micro-batch, or several of at least one row a device and of tokens enough for a matrix unit."""
    rows = experiment.data.batch_size // shards
    for parts in (1, 2, 4, 8, 16):
        if rows and rows % parts == 0 and (parts == 1 or rows // parts * experiment.data.length >= 4096):
            yield parts


def _placed(
    experiment: Experiment, devices: int, footprints: Footprints, *, tensor: int, remat: str, parts: int
) -> Placed:
    mesh = dataclasses.replace(experiment.mesh, preset="fsdp", fsdp=-1, tensor=tensor)
    model = dataclasses.replace(experiment.model, remat=remat)
    loop = dataclasses.replace(experiment.loop, micro_batches=parts)
    chosen = dataclasses.replace(experiment, mesh=mesh, model=model, loop=loop)
    sizes = meshes.axis_sizes(mesh, devices)
    return Placed(chosen, sizes, footprints.of(chosen, sizes))


def _with(section: Values, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A section as nested dicts, with values at dotted paths."""

    def copied(node: Any) -> Any:
        return {key: copied(value) for key, value in node.items()} if hasattr(node, "items") else node

    result = copied(section)
    for path, value in fields.items():
        *parents, name = path.split(".")
        node = result
        for parent in parents:
            node = node[parent]
        node[name] = value
    return result
