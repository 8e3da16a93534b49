"""The token cache as a whole: which token sets and tokenizer belong to a config, and where they lie.

`prepared-KEY.json` names them; KEY is a hash of what the config says about sources, fields, tokenizer and held-out
text, so a reader needs the cache alone and not the sources. A cache in a bucket is copied to a local disk once and
read there. Contents of the folders: data/token_shards.py.

A cache that may not be written is enough for a config that means the same text by other paths: the file that says so
then lies `beside` it, in a folder of the run.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data import token_shards
from t5x_like.data.config import DataConfig
from t5x_like.storage import paths

VERSION = 1


@dataclasses.dataclass(frozen=True)
class SetEntry:
    """One token set of a manifest. `rate`: as its source states it (SeqIO), None where the config decides."""

    folder: str
    source: str
    files: tuple[str, ...]
    rate: float | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a config's data became: {name: set} to train on and held out, and the tokenizer's folder.

    chat_template: the Jinja text that conversations were written by, "" for none; stored where there is one
    """

    tokenizer: str
    train: dict[str, SetEntry]
    validation: dict[str, SetEntry]
    chat_template: str = ""


def key(config: DataConfig) -> str:
    """16 hexadecimal digits of everything in the config that decides which tokens there are."""
    named = ("source", "fields", "preprocessors", "tokenizer", "validation")
    chosen: dict[str, Any] = {name: getattr(config, name) for name in named}
    chosen["fields"] = config.fields.given
    if config.separator:
        chosen["csv_separator"] = config.separator
    if config.extra_ids:
        chosen["extra_ids"] = config.extra_ids
    chosen |= config.reading
    chosen["sources"] = sorted(config.mixture.sources.items())
    if config.tokenizer.startswith("train:"):
        chosen["tokenizer_training_bytes"] = config.tokenizer_training_bytes
    return digest({"version": VERSION, **chosen})[:16]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def local_folder(cache_dir: str) -> pathlib.Path:
    """Where the files of a cache are read and written: itself, or the local copy of one in a bucket."""
    if not paths.is_remote(cache_dir):
        return pathlib.Path(paths.normal(cache_dir))
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return (
        pathlib.Path(root) / "t5x_like" / "tokens" / hashlib.sha256(paths.normal(cache_dir).encode()).hexdigest()[:16]
    )


def name(config: DataConfig) -> str:
    return f"prepared-{key(config)}.json"


def remember(path: pathlib.Path, value: Any) -> None:
    """Writes a file of a cache that only saves time: one that may not be written does without."""
    with contextlib.suppress(UserError):
        paths.write_json_atomic(str(path), value)


def write_manifest(
    config: DataConfig, cache_dir: str, manifest: Manifest, *, parts_sent: bool = False, beside: str = ""
) -> None:
    """Declares the config's data prepared; in a bucket only after everything it names is there, as with `parts_sent`
    it is. Where the cache may not be written, in the folder `beside`."""
    folder = local_folder(cache_dir)
    content = {"version": VERSION, **dataclasses.asdict(manifest)}
    if not manifest.chat_template:
        del content["chat_template"]
    try:
        paths.write_json_if_other(str(folder / name(config)), content)
        if paths.is_remote(cache_dir):
            for part in [] if parts_sent else _parts(manifest):
                _copy_missing(str(folder / part), paths.join(cache_dir, part))
            paths.write_json_if_other(paths.join(cache_dir, name(config)), content)
    except UserError:
        if not beside:
            raise
        paths.write_json_if_other(paths.join(beside, name(config)), content)


def fetch(config: DataConfig, cache_dir: str) -> None:
    """Copies what a bucket holds of this config's data to the local disk; does nothing for a local cache."""
    remote = paths.join(cache_dir, name(config))
    if not paths.is_remote(cache_dir) or not paths.exists(remote):
        return
    folder = local_folder(cache_dir)
    manifest = _manifest(paths.read_json(remote), remote)
    for part in _parts(manifest):
        _copy_missing(paths.join(cache_dir, part), str(folder / part))
    paths.copy_file(remote, str(folder / name(config)))


def fetch_set(cache_dir: str, part: str) -> None:
    """Copies a token set that is complete in a bucket to the local disk; does nothing for a local cache."""
    if paths.is_remote(cache_dir) and paths.exists(paths.join(cache_dir, part, token_shards.INDEX)):
        _copy_missing(paths.join(cache_dir, part), str(local_folder(cache_dir) / part))


def fetch_part(cache_dir: str, part: str) -> None:
    """Copies what a bucket holds of a folder of the cache to the local disk; does nothing for a local cache."""
    if paths.is_remote(cache_dir) and paths.is_directory(paths.join(cache_dir, part)):
        _copy_missing(paths.join(cache_dir, part), str(local_folder(cache_dir) / part))


def send_file(cache_dir: str, part: str, file: str) -> None:
    """Copies a file of a folder of the cache to its bucket, unless it is there."""
    target = paths.join(cache_dir, part, file)
    if paths.is_remote(cache_dir) and not paths.exists(target):
        paths.copy_file(str(local_folder(cache_dir) / part / file), target)


def find_manifest(config: DataConfig, cache_dir: str, beside: str = "") -> str | None:
    """The path of the file that declares the config's data prepared, in the local copy of the cache or `beside` it."""
    there = str(local_folder(cache_dir) / name(config))
    found = [path for path in (there, *([paths.join(beside, name(config))] if beside else ())) if paths.exists(path)]
    return found[0] if found else None


def read_manifest(config: DataConfig, cache_dir: str, *, beside: str = "") -> Manifest:
    """UserError when the config's data has not been prepared there."""
    fetch(config, cache_dir)
    path = find_manifest(config, cache_dir, beside)
    if path is None:
        raise UserError(f"{cache_dir}: no token cache of config.data.source={config.source!r}; run `t5x_like prepare`")
    manifest = _manifest(paths.read_json(path), path)
    if paths.is_remote(cache_dir) and path != str(local_folder(cache_dir) / name(config)):
        for part in _parts(manifest):  # which the bucket has for another config
            _copy_missing(paths.join(cache_dir, part), str(local_folder(cache_dir) / part))
    return manifest


def _manifest(content: Any, where: str) -> Manifest:
    try:
        sets = [
            {
                name: SetEntry(e["folder"], e["source"], tuple(e["files"]), e["rate"])
                for name, e in content[part].items()
            }
            for part in ("train", "validation")
        ]
        return Manifest(content["tokenizer"], *sets, chat_template=content.get("chat_template", ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a manifest of a token cache ({error!r}); delete it and prepare again") from None


def _parts(manifest: Manifest) -> list[str]:
    entries = [*manifest.train.values(), *manifest.validation.values()]
    return [manifest.tokenizer, *dict.fromkeys(entry.folder for entry in entries)]


def _copy_missing(source: str, target: str) -> None:
    """Copies the files that the target lacks, the index of a token set last."""
    there = paths.tree_files(target)
    wanted = {file: size for file, size in paths.tree_files(source).items() if not file.startswith(".")}
    for file in sorted(wanted, key=lambda file: (file == "index.json", file)):
        if there.get(file) != wanted[file]:
            paths.copy_file(paths.join(source, *file.split("/")), paths.join(target, *file.split("/")))


# What machines that write parts of one cache say to each other over a bucket. A shared folder needs nothing of it.


def fetch_tokenizers(cache_dir: str) -> None:
    """Copies the tokenizers of a cache in a bucket, and which text each was trained on."""
    if not paths.is_remote(cache_dir):
        return
    for there in paths.list_names(cache_dir):
        if there.startswith("tokenizer-"):
            _copy_missing(paths.join(cache_dir, there), str(local_folder(cache_dir) / there))
        elif there.startswith("trained-"):
            paths.copy_file(paths.join(cache_dir, there), str(local_folder(cache_dir) / there))


def send_tokenizer(cache_dir: str, tokenizer: str) -> None:
    if not paths.is_remote(cache_dir):
        return
    folder = local_folder(cache_dir)
    _copy_missing(str(folder / tokenizer), paths.join(cache_dir, tokenizer))
    for memory in folder.glob("trained-*.json"):
        if paths.read_json(str(memory))["tokenizer"] == tokenizer:
            paths.copy_file(str(memory), paths.join(cache_dir, memory.name))


def fetch_shards(cache_dir: str, part: str, shards: Iterable[int]) -> None:
    """Copies those of these shards that are finished in a bucket, so that a part that is repeated keeps them."""
    if not paths.is_remote(cache_dir):
        return
    there, folder = paths.tree_files(paths.join(cache_dir, part)), local_folder(cache_dir) / part
    for index in shards:
        names = _shard_files(index)
        if all(file in there for file in names) and token_shards.shard_facts(folder, index) is None:
            for file in names:
                paths.copy_file(paths.join(cache_dir, part, file), str(folder / file))


def send_shards(cache_dir: str, part: str, shards: Iterable[int]) -> None:
    """Copies finished shards to a bucket: the JSON that declares one complete after its tokens."""
    if not paths.is_remote(cache_dir):
        return
    there, folder = paths.tree_files(paths.join(cache_dir, part)), local_folder(cache_dir) / part
    for index in shards:
        for file in _shard_files(index):
            if there.get(file) != (folder / file).stat().st_size:
                paths.copy_file(str(folder / file), paths.join(cache_dir, part, file))


def send_index(cache_dir: str, part: str) -> None:
    if paths.is_remote(cache_dir):
        index = token_shards.INDEX
        paths.copy_file(str(local_folder(cache_dir) / part / index), paths.join(cache_dir, part, index))


def shard_facts(cache_dir: str, part: str, shards: Iterable[int]) -> list[dict[str, Any] | None]:
    """What each shard says of itself where the cache is, None for one that is not there whole; copies no tokens."""
    if not paths.is_remote(cache_dir):
        return [token_shards.shard_facts(local_folder(cache_dir) / part, index) for index in shards]
    there = paths.tree_files(paths.join(cache_dir, part))
    found: list[dict[str, Any] | None] = []
    for index in shards:
        tokens, declared = _shard_files(index)
        facts = paths.read_json(paths.join(cache_dir, part, declared)) if declared in there else None
        found.append(facts if facts is not None and there.get(tokens) == facts["size"] else None)
    return found


def _shard_files(index: int) -> tuple[str, str]:
    return f"{token_shards.shard_name(index)}.bin", f"{token_shards.shard_name(index)}.json"
