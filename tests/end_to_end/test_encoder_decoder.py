"""A T5 through its life: span corruption, fine-tuning on examples, resume, answers, scores, inspection, conversion."""

import itertools
import json
import pathlib
import random
import shutil

import pytest

import t5x_like
from t5x_like.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = [
    "--config=configs/pretrain/t5_tiny.py",
    "--config.data.tokenizer=bytes",
    "--config.model.vocab_size=359",
    "--config.model.width=64",
    *(f"--config.model.{stack}.{name}" for stack in ("encoder", "decoder") for name in ("layers=2", "mlp=128")),
    *(f"--config.model.{stack}.{name}" for stack in ("encoder", "decoder") for name in ("heads=4", "kv_heads=4")),
    *("--config.data.batch_size=8", "--config.loop.log_every_steps=1", "--config.telemetry.plot=False"),
    "--config.telemetry.measure_cpu_peak=False",
]
STEPS, SAVED = 150, 140
WORDS = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]


def _train(workdir: pathlib.Path, *arguments: str) -> None:
    assert main(["train", f"--workdir={workdir}", *arguments]) == 0


def _values(workdir: pathlib.Path) -> list[tuple]:
    """What must be equal between two runs: every row without time and rates."""
    kept = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/validation/loss", "eval/validation/accuracy")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], *(row.get(name) for name in kept)) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs: `corrupted`, a few steps of span corruption; `tuned`, which begins with it and learns to reverse."""
    folder = tmp_path_factory.mktemp("runs")
    examples = WORDS * 4
    random.Random(0).shuffle(examples)
    lines = [json.dumps({"inputs": f"reverse {word}", "targets": word[::-1]}) for word in examples]
    (folder / "words.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        few = ["--config.data.encoder_length=64", "--config.data.length=32", "--config.data.validation_batches=1"]
        _train(folder / "corrupted", *SMALL, *few, "--config.loop.steps=4", "--config.optim.schedule.warmup_steps=0")
        _train(
            folder / "tuned",
            *SMALL,
            f"--config.checkpoint.init_from={folder / 'corrupted'}",
            f"--config.data.source=jsonl:{folder / 'words.jsonl'}",
            *("--config.data.fields.inputs=inputs", "--config.data.fields.targets=targets"),
            *("--config.data.features=source_target", "--config.data.packing=examples"),
            *("--config.data.encoder_length=64", "--config.data.length=32"),
            *(f"--config.loop.steps={STEPS}", f"--config.checkpoint.every_steps={SAVED}"),
            f"--config.evaluate.every_steps={SAVED}",
        )
    return folder


def test_fine_tuning_on_packed_examples_learns_the_task_and_generate_answers(runs, capsys):
    losses = [row[1] for row in _values(runs / "tuned") if row[1] is not None]
    assert len(losses) == STEPS and losses[0] > 2 and losses[-1] < 0.2
    lm = t5x_like.load(str(runs / "tuned"))
    answers = lm.generate([f"reverse {word}" for word in WORDS], max_new_tokens=8, temperature=0)
    right = [word for word, answer in zip(WORDS, answers, strict=True) if answer == word[::-1]]
    assert len(right) > 0.9 * len(WORDS)
    word = next(word for word in right if word != word[::-1])
    prompt = [f"--prompt=reverse {word}", "--temperature=0", "--max_new_tokens=8"]
    assert main(["generate", str(runs / "tuned"), *prompt]) == 0
    assert capsys.readouterr().out == f"{word[::-1]}\n"
    assert main(["generate", str(runs / "tuned"), *prompt, f"--prefix={word[::-1][:2]}"]) == 0
    assert capsys.readouterr().out == f"{word[::-1]}\n"
    (best, greedy), (other, not_greedy) = lm.log_likelihood([f"reverse {word}"] * 2, [word[::-1], word])
    assert greedy and not not_greedy and best > other + 1


def test_a_stopped_and_resumed_run_has_the_rows_of_an_undisturbed_one(runs, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(runs / "tuned", workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    manifest = json.loads((workdir / "manifest.json").read_text())
    del manifest["finished"]
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    _train(workdir)
    assert json.loads((workdir / "manifest.json").read_text())["starts"][-1]["resumed_from"] == SAVED
    assert _values(workdir) == _values(runs / "tuned") and len(_values(workdir)) >= STEPS


@pytest.mark.parametrize(("run", "unit"), [("tuned", "words.jsonl"), ("corrupted", "input.txt")])
def test_inspect_names_the_documents_of_a_step(runs, capsys, run, unit):
    assert main(["inspect", str(runs / run), "--step=2"]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title.endswith(f"{len(lines)} documents in the batch of step 2") and len(lines) >= 8
    assert all(line.endswith(unit) for line in lines)


def test_a_converted_model_says_what_its_decoder_begins_with(runs, tmp_path):
    assert main(["convert", str(runs / "tuned"), str(tmp_path / "hf"), "--to=hf"]) == 0
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((tmp_path / "hf" / name).read_text())
        assert (stored["decoder_start_token_id"], stored["pad_token_id"], stored["eos_token_id"]) == (0, 0, 1)
