"""From a trained model to a reward model and to DPO: what each run begins with, learns, and resumes to."""

import json

import numpy as np
import pytest

import t5x_like
from t5x_like.__main__ import main
from tests.end_to_end.commands import ROOT, rows, train

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


@pytest.mark.parametrize("name", RUNS)
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
    "rows packed": (["--config.data.packing=examples"], 2, "does not go with features='pair_texts'; use 'single'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_of_an_encoder_decoder_is_one_line(case, t5, source, tmp_path, capsys):
    write(tmp_path, RUNS["reward, t5"], source, str(t5))
    arguments, status, part = BAD[case]
    assert train(tmp_path / "run", "--check", *arguments, config=f"{tmp_path}/config.py") == status
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    assert len(errors) == 1 and errors[0].startswith("t5x_like: ") and part in errors[0], errors
