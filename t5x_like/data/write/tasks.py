"""The SeqIO adapter: a Task or Mixture defined in code becomes token sets. Runs in worker processes only.

SeqIO and TensorFlow are imported inside these functions, and nothing else in the project imports them: the trainer
reads the cache. A task is run once, unshuffled, with its own preprocessors and vocabulary. A mixture is its tasks,
with the rates SeqIO computes. Tasks whose features are still text are tokenized with the config's tokenizer.
"""

import hashlib
import importlib
import importlib.util
import itertools
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from t5x_like.core.errors import UserError
from t5x_like.data import token_shards
from t5x_like.data.templates import messages
from t5x_like.data.templates.sandbox import TemplateRefused
from t5x_like.data.tokenizers import behind, sentencepiece_engine, tokenizer_files, vocabularies
from t5x_like.data.write import bad_records, chats
from t5x_like.data.write.encoding import assemble

_BATCH_EXAMPLES = 1000
_MOST_SHARDS = 64


def describe(job: dict[str, Any], report: Callable[[int], None]) -> dict[str, Any]:
    """What `job["module"]` and `job["name"]` stand for; saves the task's vocabulary, if it has one, in `job["folder"]`.

    Gives {"tasks": {name: {"shards", "fingerprint"}}, "split", "vocabulary": whether it was saved, "files"}.
    """
    provider, split = _provider(job["module"], job["name"])
    found, files = {}, []
    for task in _tasks(provider):
        if split not in task.splits:
            raise UserError(f"seqio task {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
        shards = _guarded(lambda task=task: list(task.source.list_shards(split)), task.name)
        read = [path for path in (_code(job["module"]), *shards) if path and os.path.isfile(path)]
        count = min(max(len(shards), 1), _MOST_SHARDS)
        found[task.name] = {"shards": count, "fingerprint": _fingerprint(task, split, read)}
        files += read
    vocabulary = _vocabulary(provider)
    if vocabulary is not None:
        vocabulary.save(job["folder"])
    return {"tasks": found, "split": split, "vocabulary": vocabulary is not None, "files": files}


def rates(job: dict[str, Any], report: Callable[[int], None]) -> dict[str, float]:
    """{task: rate} in a mixture whose tasks have `job["examples"]` = {task: number} cached examples."""
    mixture, _ = _provider(job["module"], job["name"])
    tasks = {task.name: _CachedTask(task, job["examples"][task.name]) for task in _tasks(mixture)}
    return {name: _guarded(lambda task=task: float(mixture.get_rate(task)), name) for name, task in tasks.items()}


class _CachedTask:
    """A task as SeqIO sees one in its own cache: rates by number of examples are computed from that of the cache."""

    cache_dir = "token cache"

    def __init__(self, task: Any, examples: int):
        self._task, self._examples = task, examples

    def get_cached_stats(self, split: str) -> dict[str, int]:
        return {"examples": self._examples}

    def num_input_examples(self, split: str) -> int:
        return self._examples

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def __eq__(self, other: object) -> bool:
        return other is self._task or other is self

    def __hash__(self) -> int:
        return hash(self._task)


def encode_shard(job: dict[str, Any], report: Callable[[int], None]) -> dict[str, Any]:
    """Runs shard `job["shard"]` of `job["shards"]` of one task and writes it as a shard of a token set.

    An example that cannot be used follows config.data.on_bad_record; what the task's own code raises is an error.
    """
    task, split = _provider(job["module"], job["name"])
    vocabulary = vocabularies.load(job["tokenizer"])
    tally = bad_records.Tally("seqio", job["files"], rule=job["on_bad_record"], several=bool(job["chat"]))
    examples = _examples(task, split, job)
    columns = tuple(job["columns"]) if job["chat"] else ()
    if job["chat"]:
        writer = chats.Writer(job["chat"], vocabulary)
        batches = _chat_batches(examples, job["shard"], writer, vocabulary, tally, report)
    else:
        batches = _batches(examples, job["shard"], vocabulary, tally, report, joined=job["joined"])
    place = pathlib.Path(job["folder"])
    return token_shards.write_shard(place, job["index"], batches, job["token_type"], columns=columns, notes=tally.facts)


def _provider(module: str, name: str) -> tuple[Any, str]:
    """(seqio Task or Mixture, split) of `NAME[:SPLIT]`; names may hold colons themselves."""
    seqio = _import(module)
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    for candidate, split in ((name, "train"), tuple(name.rsplit(":", 1)) if ":" in name else (name, "train")):
        if candidate in known:
            return seqio.get_mixture_or_task(candidate), split
    raise UserError(f"seqio:{module}:{name}: {module} registers no such task; registered: {', '.join(known) or 'none'}")


def _import(module: str) -> Any:
    try:
        import seqio
    except ImportError:
        raise UserError("seqio: sources need seqio and TensorFlow; pip install 't5x_like[data]'") from None
    if not module.endswith(".py"):
        _guarded(lambda: importlib.import_module(module), module)
        return seqio
    name = f"seqio_tasks_{hashlib.sha256(os.path.abspath(module).encode()).hexdigest()[:16]}"
    if name not in sys.modules:  # a second execution would register its tasks twice
        if not os.path.isfile(module):
            raise UserError(f"seqio:{module}: no such file")
        spec = importlib.util.spec_from_file_location(name, module)
        assert spec is not None and spec.loader is not None
        loader, sys.modules[name] = spec.loader, importlib.util.module_from_spec(spec)
        _guarded(lambda: loader.exec_module(sys.modules[name]), module)
    return seqio


def _guarded(call: Callable[[], Any], what: str, code: str | None = None) -> Any:
    """Runs code that a user wrote: what it raises becomes one line that names the place, where known in file `code`."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if frame.filename == code), frames[-1])
        text = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"seqio:{what}: {type(error).__name__}: {text} ({last.filename}, line {last.lineno})") from None


def _tasks(provider: Any) -> list[Any]:
    return list(provider.tasks) if hasattr(provider, "tasks") else [provider]


def _code(module: str) -> str | None:
    return module if module.endswith(".py") else getattr(sys.modules[module], "__file__", None)


def _fingerprint(task: Any, split: str, files: list[str]) -> str:
    """Of the module's own file and the local files that the task reads.

    A change in a module that this one imports is not seen: delete the cache after such a change.
    """
    import seqio

    digest = hashlib.sha256(f"seqio {seqio.__version__} {task.name} {split}".encode())
    for path in files:
        digest.update(pathlib.Path(path).read_bytes())
    return digest.hexdigest()


def _vocabulary(provider: Any) -> vocabularies.Vocabulary | None:
    """The task's vocabulary as one of ours; None for features that are text or ids without a vocabulary."""
    import seqio

    features = provider.output_features
    if "targets" not in features and "messages" not in features:
        raise UserError(f"seqio task {provider.name} has features {', '.join(features)}; needs targets, or messages")
    theirs = features["targets" if "targets" in features else "messages"].vocabulary
    if "inputs" in features and features["inputs"].vocabulary != theirs:
        raise UserError(f"seqio task {provider.name}: inputs and targets have two vocabularies; one model reads both")
    if isinstance(theirs, seqio.SentencePieceVocabulary):
        import tensorflow

        path = theirs.sentencepiece_model_file
        with tensorflow.io.gfile.GFile(path, "rb") as file:
            content = file.read()
        read = sentencepiece_engine.read(content, pathlib.Path(path), extra_ids=theirs.extra_ids)
        return vocabularies.Vocabulary(read)
    if isinstance(theirs, seqio.ByteVocabulary):
        return vocabularies.Vocabulary(tokenizer_files.read_bytes(extra_ids=theirs.extra_ids))
    if isinstance(theirs, seqio.PassThroughVocabulary):
        return None
    raise UserError(
        f"seqio task {provider.name}: a {type(theirs).__name__} cannot be read; use a SentencePieceVocabulary or "
        "ByteVocabulary, or leave the features as text and set config.data.tokenizer"
    )


def _batches(
    examples: Iterator[dict[str, Any]],
    shard: int,
    vocabulary: vocabularies.Vocabulary,
    tally: bad_records.Tally,
    report: Callable[[int], None],
    *,
    joined: bool,
) -> Iterator[token_shards.Encoded]:
    numbered = enumerate(examples)
    while batch := list(itertools.islice(numbered, _BATCH_EXAMPLES)):
        good = [
            (number, parts) for number, example in batch if (parts := _parts(shard, number, example, vocabulary, tally))
        ]
        if good:
            pairs = [part for _, parts in good for part in parts]
            texts = [text or "" for _, text in pairs]
            again, lengths = vocabulary.encode_batch(texts)
            counts, edges = vocabulary.count_bytes(texts, again, lengths), np.cumsum(lengths)[:-1]
            encoded = zip(np.split(again, edges), np.split(counts, edges), strict=True)
            chosen = [_choose(ids, *pair, vocabulary) for (ids, _), pair in zip(pairs, encoded, strict=True)]
            if joined:
                _join(good, chosen, vocabulary)
            sizes = np.array([len(ids) for ids, _ in chosen], np.int64).reshape(-1, 2)
            ids, counts = (np.concatenate(column) for column in zip(*chosen, strict=True))
            yield assemble(ids, counts, sizes, [(shard, number) for number, _ in good], vocabulary)
        report(len(batch))


def _join(
    good: list[tuple[int, tuple["_Part", "_Part"]]],
    chosen: list[tuple[np.ndarray, np.ndarray]],
    vocabulary: vocabularies.Vocabulary,
) -> None:
    """Targets that came as texts are encoded as they stand behind inputs that did."""
    texts = [(index, [text for _, text in parts]) for index, (_, parts) in enumerate(good)]
    told = [index for index, (_, parts) in enumerate(good) if all(ids is None for ids, _ in parts)]
    pairs = [(texts[index][1][0] or "", texts[index][1][1] or "") for index in told]
    if pairs:
        for index, found in zip(told, behind.encode(vocabulary, *zip(*pairs, strict=True)), strict=True):
            chosen[2 * index + 1] = found


def _chat_batches(
    examples: Iterator[dict[str, Any]],
    shard: int,
    writer: chats.Writer,
    vocabulary: vocabularies.Vocabulary,
    tally: bad_records.Tally,
    report: Callable[[int], None],
) -> Iterator[token_shards.Encoded]:
    numbered = enumerate(examples)
    while batch := list(itertools.islice(numbered, _BATCH_EXAMPLES)):
        written, places = [], []
        for number, example in batch:
            tally.records += 1
            try:
                found = list(writer.written(_messages(example)))
            except TemplateRefused as error:  # no fault of the example
                raise tally.refused(shard, number, error) from None
            except UserError as error:
                tally.add(shard, number, str(error))
                continue
            written += found
            places += [(shard, number)] * len(found)
        if written:
            yield chats.encode(written, places, vocabulary)
        report(len(batch))


def _messages(example: dict[str, Any]) -> list[messages.Message]:
    """The conversation of an example: its feature `messages`, which is JSON, or its inputs and targets, as texts."""
    written = _text(np.asarray(example["messages"]), "messages") if "messages" in example else ""
    if written or not {"inputs", "targets"} & example.keys():
        return messages.of_value(written, "messages", str, tools=example.get("tools"))
    texts = {}
    for name in ("inputs", "targets"):
        feature = example.get(f"{name}_pretokenized", example.get(name))
        if feature is None:
            raise UserError(f"no feature {name!r} among {', '.join(example)}")
        value = np.asarray(feature)
        if value.dtype.kind in "iu":
            raise UserError(f"{name} are ids, and a chat template needs their text; keep it as {name}_pretokenized")
        texts[name] = _text(value, name)
    return messages.of_example(texts["inputs"], texts["targets"])


def _examples(task: Any, split: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import seqio

    shard = seqio.ShardInfo(index=job["shard"], num_shards=job["shards"])
    where = f"task {task.name}, split {split}, shard {job['shard']}"
    code = _code(job["module"])
    data = _guarded(
        lambda: task.get_dataset(
            sequence_length=None, split=split, shuffle=False, seed=0, shard_info=shard, num_epochs=1
        ).as_numpy_iterator(),
        where,
        code,
    )
    for number in itertools.count():
        example = _guarded(lambda: next(data, None), f"{where}: example {number}", code)
        if example is None:
            return
        yield example


_Part = tuple[np.ndarray | None, str | None]  # (ids, text) as far as they are known


def _parts(
    shard: int, number: int, example: dict[str, Any], vocabulary: vocabularies.Vocabulary, tally: bad_records.Tally
) -> tuple[_Part, _Part] | None:
    """Inputs and targets of an example; None for a bad one, which is counted."""
    tally.records += 1
    try:
        if "targets" not in example:
            raise UserError(f"no feature 'targets' among {', '.join(example)}")
        inputs = _part(example, "inputs", vocabulary) if "inputs" in example else (None, None)
        return inputs, _part(example, "targets", vocabulary)
    except UserError as error:
        tally.add(shard, number, str(error))
        return None


def _part(example: dict[str, Any], name: str, vocabulary: vocabularies.Vocabulary) -> _Part:
    """One feature; its ids are without the BOS and EOS that every document gets. UserError where it is neither."""
    source = example.get(f"{name}_pretokenized")
    try:
        value = np.asarray(example[name])
    except ValueError:  # ragged
        value = np.empty((), object)
        value[()] = example[name]
    if value.dtype.kind in "OSU":
        return None, _text(value, name)
    shown = " ".join(f"{value!r:.80}".split())
    if value.dtype.kind not in "iu" or value.ndim != 1:
        raise UserError(f"{name} should be a text, or a row of ids, is {shown}")
    if len(value) and not 0 <= value.min() <= value.max() < vocabulary.size:
        raise UserError(f"{name} should be ids below {vocabulary.size}, are {shown}")
    ids = value.astype(np.int32)
    if len(ids) and ids[0] == vocabulary.bos_id:
        ids = ids[1:]
    if name == "targets" and len(ids) and ids[-1] == vocabulary.eos_id:
        ids = ids[:-1]
    return ids, _text(np.asarray(source), f"{name}_pretokenized") if isinstance(source, bytes) else None


def _text(value: np.ndarray, name: str) -> str:
    """The text of a feature that is one."""
    if value.ndim:
        raise UserError(f"{name} should be one text, is an array of shape {value.shape}; join them in a preprocessor")
    text = value.item()
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 at byte {error.start}") from None
    if not isinstance(text, str):
        shown = "null" if text is None else " ".join(f"{text!r:.60}".split())
        raise UserError(f"{name} should be a text, is {shown}")
    return text


def _choose(
    ids: np.ndarray | None, again: np.ndarray, counts: np.ndarray, vocabulary: vocabularies.Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, bytes per id): of the text before tokenizing where it gives these ids, else what each id decodes to."""
    if ids is None or np.array_equal(again, ids):
        return again, counts
    return ids, vocabulary.decoded_bytes(ids)
