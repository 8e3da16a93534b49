"""Preparing text into a token cache and reading it, beside SeqIO and beside what a training step consumes."""

import importlib.util
import itertools
import pathlib
import runpy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from tools.benchmark import timing
from tools.benchmark.example import arguments
from tools.benchmark.shape import SHAPE
from tools.benchmark.timing import ROOT, Values

TEXT = ROOT / "configs/data/tinyshakespeare/input.txt"
COPIES = 15  # of its 1.1 MB, so that starting does not dominate
PREPARED = {  # row: (source, tokenizer, workers)
    "lines, BPE, 1 worker": ("lines", "bpe", 1),
    "lines, BPE, 2 workers": ("lines", "bpe", 2),
    "whole files, BPE, 1 worker": ("text", "bpe", 1),
    "lines, SentencePiece, 1 worker": ("lines", "sentencepiece", 1),
}
FORMATS = ("jsonl", "jsonl.zst", "parquet")  # the same paragraphs, one worker, BPE
SEQIO_LINES = 4000
SEQIO_TASK = """
import os
import seqio

FOLDER = os.path.dirname(__file__)
VOCABULARY = seqio.SentencePieceVocabulary(os.path.join(FOLDER, "tokenizer.model"))
seqio.TaskRegistry.add(
    "lines",
    source=seqio.TextLineDataSource({"train": os.path.join(FOLDER, "lines.txt")}),
    preprocessors=[
        lambda data: data.map(lambda line: {"targets": line}),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
    ],
    output_features={"targets": seqio.Feature(VOCABULARY, add_eos=True)},
)
"""


def measure(rounds: int, steps: int) -> None:
    rounds, values = min(rounds, 3), {"steps": steps}
    with_seqio = importlib.util.find_spec("seqio") is not None
    native, seqio, trained = [], [], []
    for turn in range(rounds):
        native.append(timing.run_worker("input:prepare", values))
        seqio += [timing.run_worker("input:seqio", values)] if with_seqio else []
        trained += [timing.run_worker("step:ours", {"steps": 1})] if turn == 0 else []  # the ratio is in the thousands
    text = f"{COPIES} times tinyshakespeare ({COPIES * TEXT.stat().st_size / 1e6:.1f} MB), {SHAPE['vocab']} tokens"
    print(f"\nprepare, {text}; median of {rounds} rounds: MB of text per second, for each worker, per second of CPU")
    print(timing.machine("seqio"))
    for row, (_, _, workers) in PREPARED.items():
        _print_rates(row, [result["prepare"][row] for result in native], workers)
    for form in FORMATS:
        _print_rates(f"{form}, BPE, 1 worker", [result["prepare"][f"{form}, BPE, 1 worker"] for result in native], 1)
    for row in seqio[0] if seqio else ():
        _print_rates(row, [result[row] for result in seqio], 1)
    if not with_seqio:
        print("  SeqIO is not installed, so its rows are left out; pip install 't5x_like[data]'")
    length, read = SHAPE["length"], statistics.median(result["read"] for result in native)
    consumed = SHAPE["rows"] / trained[0]["seconds"]
    print(f"\nreading, batches of {SHAPE['rows']} rows of {length} tokens with their segments, one thread")
    print(f"  {'read':<40}{read:9.1f} rows/s  {read * length:11.0f} tokens/s")
    print(f"  {'consumed by a training step':<40}{consumed:9.1f} rows/s  {consumed * length:11.0f} tokens/s")
    print(f"  {'ratio':<40}{read / consumed:9.0f}x")


def _print_rates(row: str, results: list[dict[str, Any]], workers: int) -> None:
    wall, cpu = (statistics.median(each["bytes"] / each[key] / 1e6 for each in results) for key in ("wall", "cpu"))
    print(f"  {row:<40}{wall:7.3f} MB/s  {wall / workers:7.3f} a worker  {cpu:7.3f} per CPU second")


def _prepare(values: Values) -> dict[str, Any]:
    """{"prepare": {row: seconds and bytes}, "read": rows per second}."""
    import numpy as np

    from t5x_like.commands import prepare
    from t5x_like.data.read.loader import open_data
    from t5x_like.runs import train
    from t5x_like.runs.arguments import load_config

    with tempfile.TemporaryDirectory() as name:
        folder, text, results = pathlib.Path(name), TEXT.read_text(), {}
        (folder / "lines-0.txt").write_text(text * COPIES)
        for copy in range(COPIES):
            (folder / f"text-{copy}.txt").write_text(text)
        for kind in ("bpe", "sentencepiece"):
            _train_tokenizer(kind, folder / kind)
        for row, (kind, tokenizer, workers) in PREPARED.items():
            data = {"source": f"{kind}:{folder}/{kind}-*.txt", "tokenizer": f"{folder}/{tokenizer}", "validation": ""}
            data |= {"workers": workers, "cache": f"{folder}/{row}", "attend_across_documents": False}
            data |= {"batch_size": SHAPE["rows"], "length": SHAPE["length"]}
            chosen = arguments({f"data.{field}": value for field, value in data.items()})
            results[row] = _spent(lambda chosen=chosen: prepare.run(chosen), COPIES * TEXT.stat().st_size)
        for form in FORMATS:
            source, size = _write_paragraphs(folder, form, text * COPIES)
            data |= {"source": source, "tokenizer": f"{folder}/bpe", "workers": 1, "cache": f"{folder}/{form}"}
            given = arguments({f"data.{field}": value for field, value in data.items()})
            results[f"{form}, BPE, 1 worker"] = _spent(lambda given=given: prepare.run(given), size)
        experiment = train.from_config(load_config(chosen)[0])
        read = open_data(experiment.data, cache_dir=experiment.data.cache, seed=0)
        rows, number = np.arange(SHAPE["rows"]), itertools.count()
        batches = 200
        seconds = timing.seconds(lambda: [read.rows(next(number), rows) for _ in range(batches)], values["steps"])
    return {"prepare": results, "read": batches * SHAPE["rows"] / seconds}


def _write_paragraphs(folder: pathlib.Path, form: str, text: str) -> tuple[str, int]:
    """(source, bytes of its text): paragraphs of the text as records of a file."""
    import json

    import pyarrow
    import pyarrow.parquet

    kind, path = form.partition(".")[0], f"{folder}/paragraphs.{form}"
    texts = [part for part in text.split("\n\n") if part]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        with pyarrow.output_stream(path, compression="zstd" if form.endswith(".zst") else None) as file:
            file.write("".join(json.dumps({"text": part}) + "\n" for part in texts).encode())
    return f"{kind}:{path}", sum(len(part.encode()) for part in texts)


def _seqio(values: Values) -> dict[str, Any]:
    """SeqIO's own iteration of some of these lines, and `prepare` of the same Task, which starts TensorFlow."""
    del values
    import seqio

    from t5x_like.commands import prepare

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _train_tokenizer("sentencepiece", folder)
        size = (folder / "lines.txt").write_text("".join(TEXT.open().readlines()[:SEQIO_LINES]))
        (folder / "task.py").write_text(SEQIO_TASK)
        runpy.run_path(str(folder / "task.py"))

        def examples() -> Iterator[object]:
            task = seqio.get_mixture_or_task("lines")
            return task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator()

        next(examples())
        data = {"source": f"seqio:{folder}/task.py:lines", "tokenizer": "task", "validation": "", "workers": 1}
        chosen = arguments({f"data.{field}": value for field, value in data.items()})
        return {
            f"SeqIO alone, {SEQIO_LINES} of these lines": _spent(lambda: list(examples()), size),
            "prepare of it, with TensorFlow's start": _spent(lambda: prepare.run([*chosen, f"--workdir={name}"]), size),
        }


def _train_tokenizer(kind: str, output: pathlib.Path) -> None:
    from t5x_like.commands import train_tokenizer

    train_tokenizer.run([f"lines:{TEXT}", f"--kind={kind}", f"--size={SHAPE['vocab']}", f"--output={output}"])


def _spent(function: Callable[[], object], size: int) -> dict[str, float]:
    """What `function` takes for `size` bytes."""
    return {"bytes": size, **timing.spent(function)}


WORKERS: dict[str, timing.Worker] = {"prepare": _prepare, "seqio": _seqio}
