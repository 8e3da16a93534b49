"""`t5x_like rl` as a user calls it: what holds at the first update, what a killed run goes on with, what is refused."""

import json
import os
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest

import t5x_like
from configs.rl import test
from t5x_like.__main__ import main
from t5x_like.core.metrics import is_measurement
from t5x_like.inference.heads import read_last
from t5x_like.training.session import Session
from tests.end_to_end.commands import ROOT, rows, train
from tools import crash_test

CONFIG = "configs/rl/test.py"
UPDATES = 4  # of an iteration: 2 epochs x 16 answers / 8 rows


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def rl(workdir, *arguments, config: object = CONFIG):
    return main(["rl", *([f"--config={config}"] if config else []), f"--workdir={workdir}", *arguments])


def with_reference(tmp_path, finished, **fields):
    """A config file that begins with the model of `finished`, which is its reference too, and its functions."""
    lines = "\n".join(f"    config.{name} = {value!r}" for name, value in fields.items())
    path = tmp_path / "own.py"
    path.write_text(
        "from configs.rl import test\n\n\ndef get_config():\n    config = test.get_config()\n"
        f"    config.checkpoint.init_from = {str(finished)!r}\n"
        f"    config.roles.reference = {{'source': {str(finished)!r}, 'rules': '', 'dtype': 'stored'}}\n"
        f"    config.objective.grpo.update({{'kl_coefficient': 0.1, 'reference': 'role'}})\n{lines}\n"
        "    return config\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """A run of 8 updates in two iterations from a model that is its reference; the workdir, and its config file."""
    folder = tmp_path_factory.mktemp("rl")
    config = with_reference(folder, finished)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        arguments = ["--config.loop.steps=8", "--config.rl.epochs=2", "--config.checkpoint.every_steps=3"]
        assert rl(folder / "run", *arguments, config=config) == 0
    return folder / "run", config


def updates(workdir):
    return {row["step"]: row for row in rows(workdir) if "train/loss" in row}


def test_the_first_update_of_an_iteration_is_on_policy_and_the_first_of_all_on_the_reference(trained):
    found = updates(trained[0])
    for step in (1, 1 + UPDATES):
        assert found[step]["train/ratio_token_mean"] == 1.0
        assert found[step]["train/clipped_low_fraction"] == found[step]["train/clipped_high_fraction"] == 0.0
        assert found[step]["train/update_kl_token_mean"] == 0.0
    assert abs(found[1]["train/kl_token_mean"]) < 1e-10
    assert found[UPDATES]["train/kl_token_mean"] > 1e-6, "the policy did not move: nothing is told apart"
    assert found[UPDATES]["train/ratio_token_mean"] != 1.0


def test_rollout_and_training_agree_at_every_update(trained):
    """The old log-probabilities, by the training forward, beside those of the sampler."""
    gaps = [row["train/rollout_gap_token_mean"] for row in updates(trained[0]).values()]
    assert len(gaps) == 8 and max(gaps) < 1e-5


def test_rows_tell_what_the_answers_were_worth(trained):
    row = updates(trained[0])[1]
    for name in ("reward", "reward/share", "length_mean", "stopped_by_length", "groups_without_spread"):
        assert 0 <= row[f"train/{name}"] <= 6
    assert row["train/reward_failures/share"] == 0
    assert row["train/reward_std/share"] == pytest.approx(
        row["train/reward_std"], rel=1e-5
    )  # the one part, of weight 1
    assert 0 < row["train/reward_std_in_groups"] < row["train/reward_std"] * 1.01
    assert 1 <= row["train/length_min"] < row["train/length_mean"] < row["train/length_max"] <= 6
    assert row["train/advantage_min"] < 0 < row["train/advantage_max"] and row["train/advantage_std"] > 0
    evaluations = [row for row in rows(trained[0]) if "eval/validation/reward" in row]
    assert [row["step"] for row in evaluations] == [8]


def test_a_checkpoint_between_two_updates_holds_the_answers_that_are_pending(trained):
    arrays = crash_test.read_arrays(trained[0] / "checkpoints" / "6")
    assert arrays["rollouts/iteration"] == 1 and arrays["rollouts/tokens"].shape == (16, 6)
    assert arrays["rollouts/old_logp"].min() < 0 and arrays["rollouts/reference_logp"].min() < 0


def test_a_branch_in_mid_iteration_takes_pending_answers_only_where_they_are_its_own(trained, tmp_path, capsys):
    """Of step 6, the second update of an iteration: unchanged it is the same run; with another seed, it draws anew."""
    workdir, config = trained
    same = ["--config.loop.steps=8", "--config.rl.epochs=2", "--config.checkpoint.every_steps=3"]
    same.append(f"--config.checkpoint.branch_from={workdir}@6")
    config = config.with_name("branch.py")
    text = trained[1].read_text()
    config.write_text("\n".join(line for line in text.splitlines() if "init_from" not in line))
    assert rl(tmp_path / "same", *same, config=config) == 0
    assert "are drawn anew" not in capsys.readouterr().err
    assert updates(tmp_path / "same")[8]["train/loss"] == updates(workdir)[8]["train/loss"]
    assert rl(tmp_path / "other", *same, "--config.seed=7", config=config) == 0
    assert "are drawn anew, since they followed from: config.seed: " in capsys.readouterr().err
    row = updates(tmp_path / "other")[7]
    assert row["train/reward"] != updates(workdir)[7]["train/reward"]
    assert row["train/rollout_gap_token_mean"] < 1e-5, "answers stand beside the prompts of others"


def test_a_resume_needs_the_functions_of_the_config_file(trained, capsys):
    assert rl(trained[0], "--config.loop.steps=9", config=None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is a function of a config file, and a stored config holds no code" in line


def test_a_start_on_another_mesh_promises_the_same_prompts_and_not_the_same_answers(trained, monkeypatch):
    """Told before anything is read or compiled: the run is finished, and nothing is drawn."""
    said = []
    monkeypatch.setattr(Session, "note", lambda _, line: said.append(line))
    same = ["--config.loop.steps=8", "--config.rl.epochs=2", "--config.checkpoint.every_steps=3"]
    other = ["--config.mesh.slice=2", "--config.mesh.fsdp=4"]
    assert rl(trained[0], *same, *other, config=trained[1]) == 0
    (line,) = said
    assert line.startswith("another mesh than at the last start: fsdp=8 (8 cpu devices) -> fsdp=4 x slice=2 ")
    assert "prompts stay the same, answers drawn from here on may differ" in line and "losses" not in line


def test_a_policy_is_a_model_like_any_other(trained, capsys):
    assert main(["generate", str(trained[0]), "--prompt=a=", "--max_new_tokens=3", "--temperature=0"]) == 0
    assert "a=" in capsys.readouterr().out


def test_a_killed_run_is_bit_identical_to_an_undisturbed_one(capsys, tmp_path):
    """Killed at random moments (rollouts, updates, saves), six updates an iteration, saved after every fourth."""
    status = crash_test.main(["--rl", "--kills=3", "--stops=1", f"--folder={tmp_path}"])
    output = capsys.readouterr().out
    assert status == 0, output
    assert re.search(r"SIGTERM +stepping +(\d+) +\1 +75", output), output


def test_the_command_of_a_config_is_named_where_another_is_used(trained, finished, tmp_path, capsys):
    assert train(tmp_path / "a", config=CONFIG) == 2
    assert "start it by that" in capsys.readouterr().err
    assert train(trained[0], config=None) == 2
    assert "one of `t5x_like rl`" in capsys.readouterr().err
    assert rl(tmp_path / "b", config="configs/pretrain/test.py") == 2
    assert "one of `t5x_like train`" in capsys.readouterr().err


def test_answers_that_share_a_prompt_train_as_with_a_row_each_and_are_resumed_to_the_bit(finished, tmp_path):
    """Two updates of all answers an iteration: the same losses, and after a stop between the two the same bits."""
    config = with_reference(tmp_path, finished)
    every = ["--config.rl.prompts=8", "--config.rl.epochs=2", "--config.data.batch_size=32"]
    every += [
        "--config.optim.schedule.warmup_steps=1",
        "--config.optim.schedule.name=constant",
        "--config.evaluate.every_steps=4",
    ]
    every += ["--config.checkpoint.every_steps=3"]
    shares = [*every, "--config.rl.answers_per_row=4"]
    assert rl(tmp_path / "alone", *every, "--config.loop.steps=4", config=config) == 0
    for name, steps in (("whole", 4), ("halved", 3), ("halved", 4)):
        assert rl(tmp_path / name, *shares, f"--config.loop.steps={steps}", config=config) == 0
    alone, whole, halved = (updates(tmp_path / name) for name in ("alone", "whole", "halved"))
    assert alone[2]["train/kl_token_mean"] > 1e-6 and alone[2]["train/advantage_std"] > 0
    for step in alone:
        for name in ("loss", "kl_token_mean", "entropy_token_mean", "grad_norm", "ratio_token_mean"):
            first, second = alone[step][f"train/{name}"], whole[step][f"train/{name}"]
            assert second == pytest.approx(first, rel=2e-4, abs=1e-6), (step, name)
        assert whole[step]["train/rollout_gap_token_mean"] < 1e-5
    assert whole[1]["train/ratio_token_mean"] == whole[3]["train/ratio_token_mean"] == 1.0
    for step in (1, 2, 3, 4):
        assert halved[step]["train/loss"] == whole[step]["train/loss"]


KL = ["--config.objective.grpo.kl_coefficient=0.1"]
BAD = {
    "a batch that is no part of an iteration": (["--config.data.batch_size=5"], "does not divide the answers"),
    "an answer longer than the row": (["--config.rl.new_tokens=9"], "config.rl.new_tokens=9 is longer than a row"),
    "no prompts": (["--config.rl.generate=None"], "give prompts by one of them"),
    "prompts twice": (["--config.data.source=jsonl:x"], "give prompts by one of them"),
    "a prompt that has no room": (["--config.rl.new_tokens=8", "--config.data.truncate.rule=drop"], "is room for 1"),
    "one sample": (["--config.rl.samples=1"], "should be at least 2"),
    "answers that share no prompt": (["--config.rl.answers_per_row=3"], "should divide config.rl.samples=4"),
    "no whole rows": (
        ["--config.rl.answers_per_row=4", "--config.data.batch_size=4", "--config.loop.micro_batches=2"],
        "make no whole rows of config.rl.answers_per_row=4 in each of config.loop.micro_batches=2; use 8",
    ),
    "rows that do not divide": (["--config.rl.rows=3"], "does not divide config.rl.prompts x samples = 16"),
    "a divergence without a reference": (["--config.objective.grpo.kl_coefficient=0.1"], "needs a reference"),
    "a reference that is not there": ([*KL, "--config.objective.grpo.reference=role"], "give config.roles.reference"),
    "a base without adapters": ([*KL, "--config.objective.grpo.reference=base"], "is the policy without its adapters"),
    "spikes": (["--config.loop.on_spike=skip"], "leave it 'off'"),
    "dropout": (["--config.model.dropout=0.1"], "a policy without dropout"),
    "a tokenizer to be trained": (["--config.data.tokenizer=train:bpe:300"], "the tokenizer of the model"),
    "an unknown metric": (["--config.checkpoint.best_metric=eval/validation/loss"], "did you mean"),
    "another objective": (["--config.objective.name=lm"], "'rollouts' is nothing for config.objective.name='lm'"),
    "an end token of two": (["--config.rl.end_tokens=('ab',)"], "'ab' is 2 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    arguments, text = BAD[name]
    if "best_metric" in arguments[0]:
        arguments = [*arguments, "--config.checkpoint.every_steps=20"]
    assert rl(tmp_path / "run", "--check", *arguments) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line, line


def test_examples_of_a_file_are_prompts_with_their_answers(tmp_path, capsys):
    """The records that instruction tuning reads; long ones are cut from the left, or left out and counted."""
    records = [{"inputs": f"{letter}=", "targets": letter} for letter in "abcd"] + [{"inputs": "x" * 50, "targets": ""}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = tmp_path / "own.py"
    config.write_text(
        "from configs.rl import test\nfrom t5x_like.configs import common\n\n\ndef get_config():\n"
        "    config = test.get_config()\n    config.rl.generate = None\n"
        f"    config.data.source = config.data.validation = 'jsonl:{tmp_path}/prompts.jsonl'\n"
        "    config.data.fields.update({'inputs': 'inputs', 'targets': 'targets'})\n"
        "    config.rl.rewards = {'exact': common.reward('exact')}\n    return config\n"
    )
    assert rl(tmp_path / "cut", "--check", config=config) == 0
    assert "5 prompts" in capsys.readouterr().out
    arguments = ["--config.loop.steps=2", "--config.data.truncate.rule=drop", "--config.optim.schedule.warmup_steps=0"]
    assert rl(tmp_path / "run", *arguments, config=config) == 0
    assert re.search(r"4 prompts, 1 too long and left out", " ".join(capsys.readouterr().out.split()))
    bad = tmp_path / "bad.jsonl"
    bad.write_text((tmp_path / "prompts.jsonl").read_text() + "{broken\n")
    skip = [f"--config.data.source=jsonl:{bad}", "--config.data.on_bad_record=skip", "--check"]
    assert rl(tmp_path / "many", *skip, config=config) == 1
    assert "1 of 6 records are bad, which is more than config.data.max_bad_share=0.01" in capsys.readouterr().err
    assert rl(tmp_path / "some", *skip, "--config.data.max_bad_share=0.5", config=config) == 0
    assert "1 bad records are left out, the first is" in capsys.readouterr().err
    # A stored config without functions is resumed by the workdir alone.
    assert rl(tmp_path / "run", "--config.loop.steps=3", config=None) == 0
    assert max(updates(tmp_path / "run")) == 3


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 after one update by rewards."""
    workdir = tmp_path_factory.mktemp("t5") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        steps = ["--config.loop.steps=1", "--config.optim.schedule.warmup_steps=0", "--config.rl.held_out=0"]
        assert rl(workdir, *steps, config=f"{CONFIG}:t5") == 0
    return workdir


@pytest.mark.parametrize("architecture", ["decoder", "t5"])
def test_an_adapter_is_trained_beside_its_base_and_resumes_to_the_same_bits(request, architecture, tmp_path, capsys):
    """At first the adapter changes nothing: no divergence. Then there is one, and the base is where it was. Stopped
    after the second update of an iteration of four."""
    base = request.getfixturevalue("t5" if architecture == "t5" else "finished")
    changes = {
        "adapter": {"name": "lora", "lora": {"rank": 2}},
        "checkpoint": {"init_from": str(base), "holds": "trained"},
        "objective": {"grpo": {"kl_coefficient": 0.1, "reference": "base"}},
        "optim": {"schedule": {"steps": 8, "warmup_steps": 1}},
        "rl": {"epochs": 2, "held_out": 0},
        "evaluate": {"every_steps": 0},
    }
    config = tmp_path / "own.py"
    config.write_text(
        f"from configs.rl import test\n\n\ndef get_config():\n    config = test.get_config({architecture!r})\n"
        f"    config.update({changes!r})\n    return config\n"
    )
    for workdir, stops in (("whole", [6]), ("parts", [2, 6])):
        for steps in stops:
            assert rl(tmp_path / workdir, f"--config.loop.steps={steps}", config=config) == 0
    found, again = (updates(tmp_path / workdir) for workdir in ("whole", "parts"))
    assert abs(found[1]["train/kl_token_mean"]) < 1e-10 and found[1]["train/ratio_token_mean"] == 1.0
    assert found[6]["train/kl_token_mean"] > 1e-7 and found[6]["train/ratio_token_mean"] != 1.0
    assert max(row["train/rollout_gap_token_mean"] for row in found.values()) < 1e-5
    arrays, others = (
        crash_test.read_arrays(tmp_path / workdir / "checkpoints" / "6") for workdir in ("whole", "parts")
    )
    assert all(name.startswith("params/adapters/") for name in arrays if name.startswith("params/"))
    assert len({row["train/loss"] for row in found.values()}) == len(found) == 6
    for step, row in found.items():
        kept = {name for name in row if not is_measurement(name)}
        assert {name: again[step][name] for name in kept} == {name: row[name] for name in kept}
    assert arrays.keys() == others.keys()
    assert all(np.array_equal(array, others[name]) for name, array in arrays.items())
    capsys.readouterr()
    assert rl(tmp_path / "drop", "--config.adapter.lora.dropout=0.5", config=config) == 2
    assert "dropout" in capsys.readouterr().err


def test_a_reward_model_is_one_part_of_the_reward(finished, tmp_path, capsys):
    pairs = [{"prompt": f"{letter}=", "chosen": letter, "rejected": "x"} for letter in "abcd"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs * 4))
    judge = tmp_path / "judge.py"
    judge.write_text(
        "from configs.pretrain import test\n\n\ndef get_config():\n    config = test.get_config()\n"
        f"    config.data.update({{'source': 'jsonl:{tmp_path}/pairs.jsonl', 'features': 'pair_texts'}})\n"
        "    config.data.update({'packing': 'single', 'validation': '', 'validation_batches': 0})\n"
        "    config.data.fields.update({'text': '', 'prompt': 'prompt', 'chosen': 'chosen', 'rejected': 'rejected'})\n"
        "    config.model.scalar_heads = ('reward',)\n    config.objective.name = 'reward'\n    return config\n"
    )
    assert train(tmp_path / "judge", "--config.loop.steps=4", config=str(judge)) == 0
    config = tmp_path / "own.py"
    config.write_text(
        "from configs.rl import test\nfrom t5x_like.configs import common\n\n\ndef get_config():\n"
        "    config = test.get_config()\n    config.rl.rewards.judge = common.reward('model', weight=2.0)\n"
        f"    config.roles.reward = {{'source': {str(tmp_path / 'judge')!r}, 'rules': '', 'dtype': 'stored'}}\n"
        "    return config\n"
    )
    assert rl(tmp_path / "run", "--config.loop.steps=4", config=config) == 0
    row = updates(tmp_path / "run")[4]
    assert row["train/reward/judge"] != 0
    assert row["train/reward"] == pytest.approx(row["train/reward/share"] + 2 * row["train/reward/judge"], rel=1e-5)
    arrays = crash_test.read_arrays(tmp_path / "run" / "checkpoints" / "4")
    assert len(set(arrays["rollouts/rewards"][0].tolist())) > 4, "it says the same of all answers"
    short = ["--check", "--config.data.length=128"]
    assert rl(tmp_path / "long", *short, config=config) == 2
    assert "prompt with its answer may have 129" in capsys.readouterr().err


def test_an_encoder_decoder_is_rewarded_by_one(tmp_path):
    """What the reward model says of rollouts is what it says of the same texts by itself."""
    pairs = [{"prompt": f"{letter}=", "chosen": letter, "rejected": "x"} for letter in "abcd"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs * 4))
    judge, config = tmp_path / "judge.py", tmp_path / "own.py"
    judge.write_text(
        "from configs.rl import test\nfrom configs.pretrain import test as pretrain\n\n\ndef get_config():\n"
        "    config = pretrain.get_config()\n    config.model = test.get_config('t5').model\n"
        f"    config.data.update({{'source': 'jsonl:{tmp_path}/pairs.jsonl', 'features': 'pair_texts'}})\n"
        "    config.data.update({'packing': 'single', 'validation': '', 'encoder_length': 4, 'start_token': 'eos'})\n"
        "    config.data.fields.update({'text': '', 'prompt': 'prompt', 'chosen': 'chosen', 'rejected': 'rejected'})\n"
        "    config.model.scalar_heads = ('reward',)\n    config.objective.name = 'reward'\n    return config\n"
    )
    assert train(tmp_path / "judge", "--config.loop.steps=4", config=str(judge)) == 0
    config.write_text(
        "from configs.rl import test\nfrom t5x_like.configs import common\n\n\ndef get_config():\n"
        "    config = test.get_config('t5')\n    config.rl.rewards = {'judge': common.reward('model')}\n"
        f"    config.roles.reward = {{'source': {str(tmp_path / 'judge')!r}, 'rules': '', 'dtype': 'stored'}}\n"
        "    return config\n"
    )
    arguments = ["--config.loop.steps=2", "--config.optim.schedule.warmup_steps=0"]
    assert rl(tmp_path / "run", *arguments, config=config) == 0
    arrays = crash_test.read_arrays(tmp_path / "run" / "checkpoints" / "2")
    lm = t5x_like.load(str(tmp_path / "judge"))
    answers = [
        [lm.vocabulary.eos_id, *row[:length].tolist()]
        for row, length in zip(arrays["rollouts/tokens"], arrays["rollouts/lengths"], strict=True)
    ]
    prompts = [lm.vocabulary.encode(f"{test.letter(0, index // 4)[1]}=", eos=True) for index in range(16)]
    expected = read_last(lm.model, lm.params, answers, sources=prompts, head="reward")
    assert np.ptp(expected) > 1e-3, "it says the same of all answers"
    assert np.allclose(arrays["rollouts/rewards"][0], expected, rtol=1e-5, atol=1e-6)


def test_a_policy_learns_what_is_rewarded(tmp_path):
    """From random parameters: answers of letters, which a fifth of all bytes are. On one device, as a user has it."""
    config = tmp_path / "own.py"
    config.write_text(
        "from configs.rl import test\nfrom t5x_like.configs import common\n\n\n"
        "def letters(prompt, answer, expected):\n"
        "    return sum(sign.isascii() and sign.isalpha() for sign in answer) / 6\n\n\n"
        "def get_config():\n    config = test.get_config()\n    config.data.batch_size = 128\n"
        "    config.rl.update({'prompts': 16, 'samples': 8, 'held_out': 0})\n"
        "    config.rl.rewards = {'letters': common.reward('function', function=letters)}\n    return config\n"
    )
    command = ["t5x_like", "rl", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.loop.steps=60"]
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", *command], env=os.environ | variables, check=True, capture_output=True)
    rewards = [row["train/reward"] for row in updates(tmp_path / "run").values()]
    assert statistics.mean(rewards[:3]) < 0.35
    assert statistics.mean(rewards[-5:]) > 0.85
