"""An export: a Hugging Face folder for others to use, plain or in int8, with a model card and checksums."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_like.convert import checksums, compressed_tensors, convert, model_card, native
from t5x_like.convert.compressed_tensors import Packing, Quantize
from t5x_like.convert.families import FAMILIES
from t5x_like.convert.foreign import is_foreign
from t5x_like.convert.mapping import ModelMap
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import Tree
from t5x_like.models import config as model_config
from t5x_like.storage import manifest, model_directory, paths


@dataclasses.dataclass(frozen=True)
class Int8:
    """How weights become int8, handed over by whoever calls: dims(specs) are those that products sum, by path."""

    dims: Callable[[Tree], Mapping[str, tuple[int, ...]]]
    quantize: Quantize


# Form -> (in words for the model card, the families that can be written so).
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf": ("in plain {dtype}", tuple(FAMILIES)),
    "compressed-tensors": (
        "the matrices of its layers in int8 with one {dtype} scale for each output channel (W8A16, symmetric, round to "
        "nearest; `compressed-tensors`, pack-quantized), all else in {dtype}",
        compressed_tensors.FAMILIES,
    ),
}


def export(
    source: str,
    target: str,
    *,
    form: str,
    int8: Int8,
    dtype: str | None = None,
    step: int | None = None,
    item: str = native.PARAMS,
) -> None:
    """Writes the folder `target`. dtype: of all that is no int8; None: as stored. Raises UserError or UsageError for a
    form or family that is not written, and leaves nothing behind."""
    if form not in FORMS:
        raise UsageError(f"--format={form!r} is unknown; {nearest(form, FORMS)}")
    if is_foreign(source):
        raise UserError(
            f"{source} is a model of another program; make one of ours first: t5x_like convert {source} DIRECTORY"
        )
    place = model_directory.locate(source, step=step)
    family = model_config.resolve(model_directory.read_metadata(place.checkpoint)["config"]["model"]).family
    words, families = FORMS[form]
    if family not in families:
        raise UserError(
            f"{source} is a model of the family {family}, which --format={form} does not write; it writes "
            f"{', '.join(families)}"
        )

    def pack(mapping: ModelMap, dtype: np.dtype) -> Packing:
        # Linear modules alone, which is what engines read: neither the embedding nor the head.
        dims = {path: dims for path, dims in int8.dims(mapping.specs).items() if mapping.leaves[path].stacked}
        return Packing(dims, int8.quantize, dtype)

    convert.to_huggingface(
        source,
        target,
        dtype=dtype,
        step=step,
        item=item,
        pack=pack if form == "compressed-tensors" else None,
        finish=functools.partial(_finish, os.path.basename(paths.normal(source)), words),
    )


def _finish(name: str, words: str, folder: str, place: model_directory.ModelDirectory, note: dict[str, Any]) -> None:
    """Model card and checksums."""
    settings = paths.read_json(os.path.join(folder, "config.json"))
    config = model_config.resolve(note["config"]["model"])
    parameters = native.model(config).parameter_count()
    starts = manifest.read(paths.parent(paths.parent(place.checkpoint)))["starts"]
    form = words.format(dtype=settings["dtype"])
    card = model_card.text(name, note, starts, form=form, parameters=parameters)
    paths.write_text_atomic(os.path.join(folder, "README.md"), card)
    checksums.write(folder)
