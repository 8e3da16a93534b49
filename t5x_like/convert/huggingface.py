"""Model folders of Hugging Face: config.json, tensors in one or several safetensors files, tokenizer files.

Read as transformers 4 and 5 write them, written so that both read them alike. No code of a folder is run and no pickle
is opened.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.convert import compressed_tensors, safetensors
from t5x_like.convert.compressed_tensors import PackedTensors
from t5x_like.convert.families import FAMILIES, Family
from t5x_like.convert.layout import Span
from t5x_like.convert.safetensors import FileTensors
from t5x_like.convert.settings import Settings
from t5x_like.core.config import nearest
from t5x_like.core.errors import UserError
from t5x_like.storage import paths

CONFIG, GENERATION, INDEX, WEIGHTS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)
# Whatever a tokenizer may consist of; carried both ways as they are.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
# Ids of special tokens that a config.json holds.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_CLASSIFIER = "ForSequenceClassification"
SHARD_BYTES = 5_000_000_000
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


class Folder:
    """A model folder that is there to be read: its config.json and what family it is of."""

    def __init__(self, directory: str):
        self.path = paths.normal(directory)
        self.settings = read_object(os.path.join(self.path, CONFIG))
        self.where = os.path.join(self.path, CONFIG)
        kind = str(self.settings.get("model_type"))
        if kind not in FAMILIES:
            raise UserError(f"{self.where}: model_type={kind!r} is not converted yet; {nearest(kind, FAMILIES)}")
        self.name, self.family = kind, FAMILIES[kind]
        self._packed = self.settings.get("quantization_config") is not None
        if self._packed:
            compressed_tensors.check(self.settings["quantization_config"], where=self.where)

    def section(self, tensors: Collection[str]) -> dict[str, Any]:
        """The fields of our model's section that config.json gives; `tensors`: the names beside it."""
        return self.family.section(Settings(self.settings, self.where, tensors))

    def generation(self) -> dict[str, Any]:
        place = os.path.join(self.path, GENERATION)
        return read_object(place) if os.path.exists(place) else {}

    def tokenizer_files(self) -> list[str]:
        places = (os.path.join(self.path, name) for name in TOKENIZER_FILES)
        return [place for place in places if os.path.isfile(place)]

    @contextlib.contextmanager
    def tensors(self) -> Iterator["ShardedTensors | PackedTensors"]:
        """The tensors of all files, which are open as long as the context."""
        names = _weight_files(self.path)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safetensors.open_file(os.path.join(self.path, name))) for name in names]
            tensors = ShardedTensors(self.path, files)
            yield PackedTensors(tensors) if self._packed else tensors


def is_folder(directory: str) -> bool:
    """Whether a directory, local or not, looks like one of Hugging Face's: a config.json that names a `model_type`."""
    place = paths.join(paths.normal(directory), CONFIG)
    if not (paths.exists(place) if paths.is_remote(place) else os.path.isfile(place)):
        return False
    try:
        content = json.loads(paths.read_bytes(place))
    except ValueError:
        return False
    return isinstance(content, dict) and "model_type" in content


class ShardedTensors:
    """The tensors of several files as one (mapping.Source)."""

    def __init__(self, where: str, files: Sequence[FileTensors]):
        self.where, self._files = where, {}
        for file in files:
            for name in file.described():
                if name in self._files:
                    raise UserError(f"{where}: {name!r} is in two files, {self._files[name].where} and {file.where}")
                self._files[name] = file

    def described(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for file in dict.fromkeys(self._files.values()):
            found.update(file.described())
        return found

    def read(self, name: str, span: Span, *, reuse: bool = False, dtype: Any = None) -> np.ndarray:
        return self._files[name].read(name, span, reuse=reuse, dtype=dtype)


def read_object(path: str) -> dict[str, Any]:
    """The object of a JSON file."""
    content = paths.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold one JSON object")
    return content


def _weight_files(folder: str) -> list[str]:
    if os.path.exists(os.path.join(folder, INDEX)):
        return _indexed(os.path.join(folder, INDEX))
    if os.path.exists(os.path.join(folder, WEIGHTS)):
        return [WEIGHTS]
    found = sorted(name for name in os.listdir(folder) if name.endswith(_PICKLED))
    if found:
        raise UserError(
            f"{folder}: {found[0]} is no safetensors file, and a pickled one may run code; load it with transformers "
            "where you trust it, and save_pretrained() writes safetensors"
        )
    raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; it is no whole model")


def _indexed(path: str) -> list[str]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; copy it again")
    for name in weight_map.values():
        plain = isinstance(name, str) and os.path.basename(name) == name and name.endswith(".safetensors")
        if not plain or "\\" in name:
            raise UserError(f"{path}: {name!r} is no name of a safetensors file in its folder")
    return sorted(set(weight_map.values()))


def settings(family: Family, config: Any, *, dtype: str, token_ids: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config.json of a model of ours. Both spellings of a field that transformers 4 and 5 call otherwise."""
    of_head = _of_head(family, config, token_ids)
    return {
        "architectures": [family.architecture],
        "model_type": name,
        **family.settings(config),
        **token_ids,
        **of_head,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _of_head(family: Family, config: Any, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model with a scalar head, which is a classifier of one label there: it reads the last token that is no
    padding, and padding must not be the end of the text, whose number is the one wanted."""
    if not config.scalar_heads:
        return {}
    (name,) = config.scalar_heads
    pad = token_ids.get("pad_token_id")
    return {
        "architectures": [family.architecture.replace("ForCausalLM", _CLASSIFIER).replace("LMHeadModel", _CLASSIFIER)],
        "id2label": {"0": name},
        "label2id": {name: 0},
        "pad_token_id": None if pad == token_ids.get("eos_token_id") else pad,
    }


class FolderWriter:
    """Tensors of a new folder, in files of at most `shard_bytes` (one tensor may be more). A mapping.Target."""

    def __init__(
        self,
        folder: str,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        *,
        shard_bytes: int = SHARD_BYTES,
    ):
        shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
        room, total = shard_bytes, 0
        for name, (shape, dtype) in tensors.items():
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            if size > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = (shape, dtype)
            room, total = room - size, total + size
        count = len(shards)
        names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._writers = [
            safetensors.Writer(os.path.join(folder, file), shard) for file, shard in zip(names, shards, strict=True)
        ]
        self._by_name = {name: writer for writer, shard in zip(self._writers, shards, strict=True) for name in shard}
        if count > 1:
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            paths.write_json_atomic(
                os.path.join(folder, INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map}
            )

    def write(self, name: str, span: Span, array: np.ndarray) -> None:
        self._by_name[name].write(name, span, array)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
