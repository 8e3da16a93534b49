"""From a trained model to a reward model and to DPO: what each run begins with, learns, and resumes to."""

import json

import numpy as np
import pytest

from t5x_like.__main__ import main
from tests.end_to_end.commands import ROOT, rows

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


def of_training(workdir, name):
    return [row[f"train/{name}"] for row in rows(workdir) if f"train/{name}" in row]


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_which_answer_is_better_and_resumes_to_the_same_bits(finished, source, tmp_path, name):
    base = str(finished)
    changes = "\n    ".join(line.format(base=base) for line in RUNS[name])
    (tmp_path / "config.py").write_text(CONFIG.format(source=source, base=base, changes=changes))
    for workdir, first in (("whole", STEPS), ("parts", 5)):
        given = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path / workdir}", f"--config.loop.steps={first}"]
        assert main(["train", *given]) == 0
    assert main(["train", f"--workdir={tmp_path / 'parts'}", f"--config.loop.steps={STEPS}"]) == 0
    losses, accuracies = (of_training(tmp_path / "whole", part) for part in ("loss", "accuracy"))
    assert of_training(tmp_path / "parts", "loss") == losses and len(losses) == STEPS
    if name != "reward":
        assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] < 0.4 and accuracies[-1] == 1.0
