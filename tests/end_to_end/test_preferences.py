"""From a trained model to a reward model and to DPO: what each run begins with, learns, and resumes to."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.data import reference_logp
from tests.end_to_end.commands import ROOT, rows, train
from tests.end_to_end.launches import Launch

STEPS = 12
CONFIG = """
from configs.pretrain import test


def get_config():
    config = test.get_config()
    config.data.update({{"source": {source!r}, "packing": "single", "validation": ""}})
    config.data.fields.update({{"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}})
    config.evaluate.every_steps = 0
    config.checkpoint.update({{"init_from": {base!r}, "every_steps": 5}})
    config.optim.schedule.update({{"steps": 12, "warmup_steps": 1}})
    config.loop.steps = 12
    {changes}
    return config
"""
ROLE = 'config.roles = {{"reference": {{"source": {base!r}, "rules": "", "dtype": "stored"}}}}'
SIZE = '{{"layers": 2, "heads": 4, "kv_heads": 4, "head_size": 8, "mlp": 64}}'
T5 = [
    'config.model.update({{"family": "t5"}})',
    f"config.model.encoder.update({SIZE})",
    f"config.model.decoder.update({SIZE})",
    'config.data.update({{"encoder_length": 24, "length": 20}})',
]
RUNS = {
    "reward": [
        'config.objective.name = "reward"',
        'config.data.features = "pair_texts"',
        'config.model.scalar_heads = ("reward",)',
    ],
    "dpo beside a second model": ['config.objective.name = "dpo"', 'config.data.features = "pairs"', ROLE],
    "dpo of an adapter": [
        'config.objective.name = "dpo"',
        'config.data.features = "pairs"',
        'config.objective.dpo.update({{"reference": "base", "beta": 1.0}})',
        'config.adapter.name = "lora"',
        'config.checkpoint.holds = "trained"',
        "config.optim.learning_rate = 0.05",
    ],
}
# The same of an encoder-decoder.
RUNS |= {f"{name}, t5": [*lines, *T5] for name, lines in RUNS.items()}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pairs of which the answer in capitals is better."""
    draw = np.random.default_rng(0)
    words = ["to be", "or not", "the question", "whether", "nobler", "in the mind"]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(64):
            prompt, one, other = map(str, draw.choice(words, 3))
            file.write(json.dumps({"prompt": prompt, "chosen": one.upper(), "rejected": other}) + "\n")
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def t5(source, tmp_path_factory):
    """A T5 that has read the prompts a little."""
    folder = tmp_path_factory.mktemp("t5")
    examples = [
        'config.data.update({{"features": "source_target"}})',
        'config.data.fields.update({{"prompt": "", "chosen": "", "rejected": ""}})',
        'config.data.fields.update({{"inputs": "prompt", "targets": "chosen"}})',
        "config.checkpoint.init_from = None",
    ]
    write(folder, [*examples, *T5], source, "")
    assert train(folder / "run", "--config.loop.steps=2", config=f"{folder}/config.py") == 0
    return folder / "run"


def write(folder, lines, source, base):
    changes = "\n    ".join(line.format(base=base) for line in lines)
    (folder / "config.py").write_text(CONFIG.format(source=source, base=base, changes=changes))


def of_training(workdir, name):
    return [row[f"train/{name}"] for row in rows(workdir) if f"train/{name}" in row]


# The second model beside a T5 is also in test_a_reference_in_the_cache_is_the_one_beside_the_policy.
SLOW = ("dpo beside a second model, t5",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_it_learns_which_answer_is_better_and_resumes_to_the_same_bits(request, source, tmp_path, name):
    base = str(request.getfixturevalue("t5" if name.endswith("t5") else "finished"))
    write(tmp_path, RUNS[name], source, base)
    for workdir, first in (("whole", STEPS), ("parts", 5)):
        given = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path / workdir}", f"--config.loop.steps={first}"]
        assert main(["train", *given]) == 0
    assert main(["train", f"--workdir={tmp_path / 'parts'}", f"--config.loop.steps={STEPS}"]) == 0
    losses, accuracies = (of_training(tmp_path / "whole", part) for part in ("loss", "accuracy"))
    assert of_training(tmp_path / "parts", "loss") == losses and len(losses) == STEPS
    if not name.startswith("reward"):
        assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] < 0.4 and accuracies[-1] == 1.0
    if name.startswith("reward"):
        lm = t5x_like.load(str(tmp_path / "whole"))
        better, worse = (lm.read(["to be"] * 2, answers) for answers in (["WHETHER", "NOBLER"], ["whether", "nobler"]))
        assert (better > worse).all()
        assert lm.read(["to be"], ["NOBLER"])[0] == better[1], "another text beside it changes what it says"


BAD = {
    "pairs whose prompts differ": (["--config.data.fields.prompt="], 1, "the prompts of a pair differ"),
    "a template of other tokens": (["--config.data.chat.template=chatml"], 2, "the tokenizer lacks <|im_start|>"),
    "a field that is not there": (["--config.data.fields.rejected=worse"], 1, "no field 'worse' among prompt, chosen"),
    "no rejected answer": (["--config.data.fields.rejected="], 2, "give chosen and rejected, and prompt unless"),
    "answers without room": (["--config.data.length=1"], 1, "no token to train on in its rows of 1"),
    "sources of no token": (["--config.data.encoder_length=0"], 2, "set config.data.encoder_length to the most tokens"),
    "a minimum that answers have anyway": (["--config.data.truncate.min_targets=2"], 2, "has no effect with features="),
    "a start token that is none": (["--config.data.start_token=begin"], 2, "start_token='begin' is no token"),
    "a head that is missing": (["--config.model.scalar_heads=()"], 2, "set config.model.scalar_heads=('reward',)"),
    "dropout": (["--config.model.dropout=0.1"], 2, "model.dropout=0.1: config.objective.name='reward' compares two"),
    "no such rule of answers": (["--config.data.answers=join"], 2, "answers='join' is unknown; did you mean 'joined'?"),
    "rows packed": (["--config.data.packing=examples"], 2, "does not go with features='pair_texts'; known: single"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_of_an_encoder_decoder_is_one_line(case, t5, source, tmp_path, capsys):
    write(tmp_path, RUNS["reward, t5"], source, str(t5))
    arguments, status, part = BAD[case]
    assert train(tmp_path / "run", "--check", *arguments, config=f"{tmp_path}/config.py") == status
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    assert len(errors) == 1 and errors[0].startswith("t5x_like: ") and part in errors[0], errors


DPO = RUNS["dpo beside a second model"]
CACHED = [*DPO, 'config.objective.dpo.update({{"reference": "cache", "length_normalized": True}})']
CACHED += ['config.data.update({{"validation": "0.25"}})', "config.evaluate.every_steps = 3"]


def numbers(cache):
    """{file: bytes} of all log-probabilities in a token cache, and when each was written."""
    found = sorted(pathlib.Path(cache).glob("reference-*/*"))
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def start(folder, name, *arguments, steps=6):
    given = [f"--config.loop.steps={steps}", f"--config.data.cache={folder / 'cache'}", *arguments]
    return train(folder / name, *given, config=f"{folder}/config.py")


def of_both(folder, runs):
    """Losses of training and of held-out pairs of each run."""
    names = ("train/loss", "eval/validation/loss")
    return [[[row[name] for row in rows(folder / run) if name in row] for name in names] for run in runs]


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_a_reference_in_the_cache_is_the_one_beside_the_policy(request, source, tmp_path, kind):
    """The same losses, of held-out pairs too."""
    base = str(request.getfixturevalue("t5" if kind == "t5" else "finished"))
    write(tmp_path, [*CACHED, *(T5 if kind == "t5" else [])], source, base)
    assert start(tmp_path, "beside", "--config.objective.dpo.reference=role") == 0
    assert numbers(tmp_path / "cache") == {}
    assert start(tmp_path, "cached") == 0
    names = [pathlib.Path(path).name for path in numbers(tmp_path / "cache")]
    assert sorted(names) == sorted(2 * ["about.json", "index.json", "part-00000.f32"])
    found, expected = of_both(tmp_path, ("cached", "beside"))
    assert len(set(expected[0])) == 6 and min(expected[0]) < 0.6
    assert found == expected, "they were the same to the bit on this machine's CPU"


def test_a_reference_in_the_cache_is_computed_once(finished, source, tmp_path):
    """Whatever the steps, the batches and the mesh of a run; a resume reads it too."""
    write(tmp_path, CACHED, source, str(finished))
    assert start(tmp_path, "whole") == 0
    made = numbers(tmp_path / "cache")
    assert start(tmp_path, "parts", steps=3) == 0
    assert train(tmp_path / "parts", "--config.loop.steps=6", config=None) == 0
    found, expected = of_both(tmp_path, ("parts", "whole"))
    assert found == expected and len(set(expected[0])) == 6
    other = ["--config.seed=1", "--config.data.batch_size=4", "--config.mesh.preset=fsdp_tensor"]
    assert start(tmp_path, "other", *other, "--config.mesh.fsdp=4", "--config.mesh.tensor=2", steps=2) == 0
    assert of_training(tmp_path / "other", "loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert numbers(tmp_path / "cache") == made


def test_another_reference_is_computed_anew_and_refused_by_a_run_that_goes_on(finished, source, tmp_path, capsys):
    write(tmp_path, CACHED, source, str(finished))
    assert start(tmp_path, "run", steps=3) == 0
    made = numbers(tmp_path / "cache")
    another = f"--config.roles.reference.source={tmp_path / 'run'}"
    capsys.readouterr()
    assert train(tmp_path / "run", another, "--config.loop.steps=4", config=None) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.roles.reference: " in line and "now gives other parameters" in line
    assert numbers(tmp_path / "cache") == made
    assert start(tmp_path, "new", another, steps=3) == 0
    assert made.items() < numbers(tmp_path / "cache").items()
    assert start(tmp_path, "shorter", "--config.data.length=16", steps=3) == 0  # other rows of the same tokens
    assert len(numbers(tmp_path / "cache")) == 3 * len(made)


def test_a_start_that_is_killed_while_it_computes_goes_on_where_it_was(finished, source, tmp_path, monkeypatch):
    """Four parts to train on or so, and two held out; killed after the second."""
    monkeypatch.setattr(reference_logp, "PART", 12)
    write(tmp_path, CACHED, source, str(finished))
    assert start(tmp_path, "whole", steps=3) == 0
    made = contents(tmp_path / "cache")
    assert sum("part-" in name for name in made) > 4
    dies = (
        "import os, signal, sys\nfrom t5x_like.__main__ import main\nfrom t5x_like.data import reference_logp\n"
        "reference_logp.PART = 12\nwrite, done = reference_logp.Store.write, []\n"
        "def dying(self, part, numbers):\n    write(self, part, numbers)\n    done.append(part)\n"
        "    if len(done) == 2:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "reference_logp.Store.write = dying\nsys.exit(main(sys.argv[1:]))\n"
    )
    cache = tmp_path / "killed-cache"
    given = ["train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path / 'killed'}", "--config.loop.steps=3"]
    given += [f"--config.data.cache={cache}"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"}
    killed = subprocess.run([sys.executable, "-c", dies, *given], env=variables, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = numbers(cache)
    assert sum("part-" in path for path in before) == 2 and not any("index" in path for path in before)
    assert main(given) == 0
    after = numbers(cache)
    assert before.items() < after.items()
    assert contents(cache) == made
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_what_a_reference_says_to_two_processes_is_what_it_says_to_one(finished, source, tmp_path, monkeypatch):
    """Both compute every part, of which the last is not full; one writes."""
    monkeypatch.setattr(reference_logp, "PART", 12)
    monkeypatch.setenv("REFERENCE_PART", "12")
    write(tmp_path, CACHED, source, str(finished))
    given = ["--config.mesh.preset=fsdp", "--config.data.validation=", "--config.evaluate.every_steps=0"]
    assert start(tmp_path, "one", *given, steps=2) == 0
    given += [f"--config.data.cache={tmp_path / 'shared'}", "--config.loop.steps=2"]
    given += ["--config.runtime.heartbeat_seconds=30", "--config.telemetry.tensorboard=False"]
    launch = Launch(tmp_path / "two", f"--config={tmp_path}/config.py", *given)
    assert launch.finish() == 0, launch.output
    one, two = contents(tmp_path / "cache"), contents(tmp_path / "shared")
    parts = [name for name in one if name.endswith(".f32")]
    assert one.keys() == two.keys() and len(parts) == 6 and {len(one[name]) for name in parts} == {12 * 8, 4 * 8}
    for name in parts:
        expected, found = (np.frombuffer(each[name], "<f4") for each in (one, two))
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (tmp_path / "two" / "parts-0.txt").read_text().split() == [str(part) for part in range(6)]
    assert not (tmp_path / "two" / "parts-1.txt").exists()
    first, second = (of_training(workdir, "loss") for workdir in (tmp_path / "one", launch.workdir))
    assert len(first) == 2 and first[0] != first[1] and second == pytest.approx(first, rel=1e-6)


def contents(cache):
    return {os.path.relpath(path, cache): content for path, (content, _) in numbers(cache).items()}


def rows_of(workdir):
    return of_training(workdir, "loss") + [row.get("eval/validation/loss") for row in rows(workdir)]


BAD_CACHED = {
    "a reference of another kind": (T5, "config.roles.reference is a model of architecture='decoder'"),
    "no reference": (["config.roles = {{}}"], "give config.roles.reference with a source"),
    "a reference that is not there": (
        ['config.roles.reference.source = "no/such/model"'],
        "config.roles.reference.source: no/such/model",
    ),
}


@pytest.mark.parametrize("case", BAD_CACHED)
def test_a_reference_that_cannot_be_read_is_one_line(case, finished, source, tmp_path, capsys):
    changes, part = BAD_CACHED[case]
    write(tmp_path, [*CACHED, "config.checkpoint.init_from = None", *changes], source, str(finished))
    assert start(tmp_path, "run", "--check") in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    assert len(errors) == 1 and part in errors[0], errors
