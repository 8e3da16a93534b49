"""Model directories of ours as a conversion writes and reads them: `checkpoints/0/` without an optimizer, `tokenizer/`.

The one place where a section of a config is made whole from the fields that a foreign file gives.
"""

import dataclasses
import os
import shutil
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_like.convert.mapping import ModelMap, Reading, Table
from t5x_like.convert.transfer import to_native
from t5x_like.core import tree
from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import vocabularies
from t5x_like.models.config import ModelConfig, resolve
from t5x_like.models.model import Model
from t5x_like.parallel.rules import rules
from t5x_like.storage import manifest, model_directory, paths, streams

_VOCAB_MULTIPLE = 128  # as in configs/common
PARAMS = "params"


def model_config(name: str, fields: Mapping[str, Any], *, dtype: str, where: str) -> ModelConfig:
    """The config of a converted model: the family's numbers with `fields` over them."""
    section = {
        **_empty(ModelConfig),
        "family": name,
        "size": "custom",
        "vocab_multiple": _VOCAB_MULTIPLE,
        "dropout": 0.0,
        "scan": True,
        "remat": "none",
        "attention_block": 1024,
        "dtype": {"params": dtype, "compute": "auto", "products": "compute"},
    }
    try:
        return resolve(_over(section, fields))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def model_specs(config: ModelConfig) -> dict[str, Any]:
    """path -> ParamSpec."""
    return tree.flatten(model(config).specs())


def model(config: ModelConfig) -> Model:
    """A model to ask about its parameters."""
    return Model(config, rules(), DtypePolicy(config.dtype.params, config.dtype.params))


def model_map(table: Callable[[ModelConfig], Table], config: ModelConfig) -> ModelMap:
    return ModelMap(table(config), model_specs(config), vocab_size=config.vocab_size)


def write(
    directory: str,
    config: ModelConfig,
    reading: Reading,
    mapping: ModelMap,
    *,
    dtype: str | None,
    tokenizer: Sequence[str],
    provenance: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Writes a model directory into an empty folder. `tokenizer`: files of it; `extra` goes into the metadata."""
    fingerprint = _write_tokenizer(os.path.join(directory, model_directory.TOKENIZER), tokenizer, config)
    checkpoint = os.path.join(directory, model_directory.CHECKPOINTS, "0")
    moved = to_native(reading, mapping, os.path.join(checkpoint, PARAMS), dtype=dtype)
    complete(checkpoint, config, moved, provenance={**provenance, **fingerprint}, extra=extra)


def complete(
    checkpoint: str,
    config: ModelConfig,
    moved: Mapping[str, Any],
    *,
    provenance: Mapping[str, Any],
    extra: Mapping[str, Any],
    axes: Mapping[str, Sequence[str | None]] | None = None,
    sections: Mapping[str, Any] | None = None,
) -> None:
    """Makes a folder with the item PARAMS a checkpoint. moved: as `transfer.to_native` gives it.

    axes: by path, where they are not those of the model. sections: of the config, besides the model's.
    """
    axes = axes or {path: list(spec.axes) for path, spec in model_specs(config).items()}
    metadata = {
        "config": {"model": paths.as_json(dataclasses.asdict(config)), **(sections or {})},
        "provenance": {**provenance, "revision": manifest.revision(), "versions": manifest.versions()},
        "axes": {PARAMS: axes},
        **extra,
    }
    note = model_directory.note(
        step=0,
        arrays={PARAMS: moved["arrays"]},
        kinds={PARAMS: {}},
        fingerprints={PARAMS: moved["fingerprints"]},
        metrics={},
        metadata=metadata,
    )
    streams.write_note(checkpoint, note)


def _write_tokenizer(folder: str, files: Sequence[str], config: ModelConfig) -> dict[str, str]:
    """Copies the files of a tokenizer unchanged and adds our `vocabulary.json`. Returns {"tokenizer": fingerprint}."""
    if not files:
        return {}
    os.makedirs(folder, exist_ok=True)
    for file in files:
        shutil.copyfile(file, os.path.join(folder, os.path.basename(file)))
    vocabulary = vocabularies.load(folder)
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"{os.path.dirname(files[0])}: its tokenizer has {vocabulary.size} tokens, its model {config.vocab_size}"
        )
    vocabulary.save(folder)
    return {"tokenizer": vocabulary.fingerprint}


def _empty(hint: Any) -> Any:
    """A section with every field of a config class, all None; of a type like `X | None` those of X."""
    parts = (hint, *typing.get_args(hint))
    cls = next((part for part in parts if dataclasses.is_dataclass(part)), None)
    if cls is None:
        return None
    hints = typing.get_type_hints(cls)
    return {field.name: _empty(hints[field.name]) for field in dataclasses.fields(cls)}


def _over(section: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The section with `fields` over it, nested ones too."""
    result = dict(section)
    for name, value in fields.items():
        result[name] = _over(result.get(name) or {}, value) if isinstance(value, Mapping) else value
    return result
