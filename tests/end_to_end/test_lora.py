"""An adapter through its life as a user has it: trained on a finished run, resumed, loaded, refused on another base."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import t5x_like
from configs.pretrain import test as test_config
from t5x_like.__main__ import main
from t5x_like.convert.stored import open_model
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.parallel import mesh as meshes
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.storage.model_directory import digest, read_metadata
from tests.end_to_end.commands import ROOT, rows, train, values

STEPS = "--config.optim.schedule.steps=8"
LORA = ("--config.adapter.name=lora", "--config.adapter.lora.rank=4", "--config.adapter.lora.dropout=0.1")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def lora(workdir: pathlib.Path, base: pathlib.Path, *arguments: str) -> int:
    source = (f"--config.checkpoint.init_from={base}", "--config.checkpoint.holds=trained")
    return train(workdir, *LORA, STEPS, *source, *arguments)


@pytest.fixture(scope="module")
def adapters(finished, tmp_path_factory):
    """Workdirs beside a copy of their base: two adapters, of other seeds."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(finished, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert lora(folder / "one", folder / "base", "--config.loop.steps=8") == 0
        assert lora(folder / "two", folder / "base", "--config.loop.steps=4", "--config.seed=1") == 0
    return folder


def files(folder: pathlib.Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != "lock"}


def logits(lm) -> np.ndarray:
    return lm.logits(np.arange(40).reshape(2, 20))


def test_a_checkpoint_holds_the_adapter_alone_and_names_its_base(adapters, finished, capsys):
    note = read_metadata(str(adapters / "one/checkpoints/8"))
    assert note["base"]["directory"] == str(adapters / "base/checkpoints/12")
    assert {path.split("/")[0] for path in note["arrays"]["params"]} == {"adapters"}
    assert len(note["arrays"]["params"]) == 14
    slots = {path.split("/")[1] for path in note["arrays"]["optimizer"] if path != "count"}
    assert slots == {"adapters"}, "the optimizer has state of nothing else"
    assert files(adapters / "base") == files(finished), "training an adapter writes nothing into its base"
    assert main(["inspect", str(adapters / "one")]) == 0
    assert f"its base is {adapters / 'base/checkpoints/12'}" in capsys.readouterr().out
    assert main(["generate", str(adapters / "one"), "--prompt=To be", "--max_new_tokens=4"]) == 0


def test_a_resume_goes_on_to_the_same_bits(adapters, tmp_path):
    assert lora(tmp_path / "run", adapters / "base", "--config.loop.steps=3") == 0
    assert train(tmp_path / "run", "--config.loop.steps=8", config=None) == 0
    kept = [row for row in values(tmp_path / "run") if row[1] is not None]
    assert kept == [row for row in values(adapters / "one") if row[1] is not None]
    one, again = (read_metadata(str(path / "checkpoints/8")) for path in (adapters / "one", tmp_path / "run"))
    assert one["fingerprints"] == again["fingerprints"]
    losses = [row[1] for row in kept]
    assert len(set(losses)) == 8


def test_several_adapters_share_the_arrays_of_one_base(adapters):
    base = t5x_like.load(str(adapters / "base"))
    one, two = (t5x_like.load(str(adapters / name), base=base) for name in ("one", "two"))
    held = {path: leaf for path, leaf in tree.leaves(base.params)}
    for lm in (one, two):
        wrapped = [leaf for _, leaf in tree.leaves(lm.params) if not isinstance(leaf, jax.Array)]
        assert len(wrapped) == 7
        for path, leaf in tree.leaves(lm.params):
            assert getattr(leaf, "base", leaf) is held[path], path
    plain, first, second = logits(base), logits(one), logits(two)
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, logits(t5x_like.load(str(adapters / "one"))))
    assert one.generate("To be", max_new_tokens=4, temperature=0.0)


def test_an_adapter_is_refused_on_another_base(adapters, tmp_path, capsys):
    assert train(tmp_path / "other", "--config.loop.steps=2", STEPS, "--config.seed=5") == 0
    other = t5x_like.load(str(tmp_path / "other"))
    with pytest.raises(UserError, match="is an adapter of .*base/checkpoints/12, and base is .*whose parameters are"):
        t5x_like.load(str(adapters / "one"), base=other)
    one = t5x_like.load(str(adapters / "one"))
    with pytest.raises(UsageError, match="base has an adapter itself"):
        t5x_like.load(str(adapters / "two"), base=one)
    with pytest.raises(UsageError, match="is no adapter that names its base"):
        t5x_like.load(str(tmp_path / "other"), base=other)
    with pytest.raises(UsageError, match="give them there"):
        t5x_like.load(str(adapters / "one"), base=other, dtype="stored")
    # Where the directory of the base holds another model by now.
    moved = tmp_path / "run"
    shutil.copytree(adapters / "one", moved)
    metadata = moved / "checkpoints/8/metadata/metadata"
    note = json.loads(metadata.read_text())
    note["base"]["directory"] = str(tmp_path / "other/checkpoints/2")
    metadata.write_text(json.dumps(note | {"sha256": digest(note)}))
    assert main(["generate", str(moved), "--prompt=a"]) == 1
    assert "was trained on other parameters than its base" in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(moved / "checkpoints/8")


def test_an_adapter_is_no_whole_model(adapters, tmp_path, capsys):
    """Neither as what another run begins with, nor below an adapter."""
    begin = f"--config.checkpoint.init_from={adapters / 'one'}"
    assert train(tmp_path / "run", begin) == 1
    assert "is an adapter, and a whole model is wanted here; merge it by" in capsys.readouterr().err.splitlines()[-1]


def test_a_policy_of_reinforcement_learning_may_be_an_adapter(adapters, tmp_path):
    """Kept near its base, which is the policy without it: the same at first, then another."""
    arguments = [
        *("--config=configs/rl/test.py", f"--workdir={tmp_path / 'rl'}", "--config.adapter.name=lora"),
        *(f"--config.checkpoint.init_from={adapters / 'base'}", "--config.checkpoint.holds=trained"),
        *("--config.objective.grpo.kl_coefficient=0.1", "--config.objective.grpo.reference=base"),
        *("--config.loop.steps=4", "--config.optim.schedule.steps=8", "--config.rl.epochs=2"),
    ]
    assert main(["rl", *arguments]) == 0
    found = [row for row in rows(tmp_path / "rl") if "train/loss" in row]
    assert found[0]["train/ratio_token_mean"] == 1.0 and abs(found[0]["train/kl_token_mean"]) < 1e-10
    assert found[-1]["train/kl_token_mean"] > 1e-9 and found[-1]["train/ratio_token_mean"] != 1.0
    assert max(row["train/rollout_gap_token_mean"] for row in found) < 1e-5
    note = read_metadata(str(tmp_path / "rl/checkpoints/4"))
    assert all(path.startswith("adapters/") for path in note["arrays"]["params"])
    assert main(["rl", *arguments, "--config.adapter.lora.dropout=0.5"]) == 2


def test_a_head_is_trained_beside_an_adapter(adapters):
    """It begins with the run, and no base has it."""
    config = test_config.get_config()
    config.model.scalar_heads = ("reward",)
    config.adapter.name = "lora"
    config.checkpoint.init_from = str(adapters / "base")
    experiment = experiments.from_config(config)
    mesh = meshes.make(experiment.mesh, jax.devices()[:1])
    parts = programs.step_program(experiment, mesh).parts
    roots = {path.split("/")[0] for path, _ in tree.leaves(parts.trained)}
    assert roots == {"adapters", "heads"}
    assert "heads" not in parts.frozen["base"].specs


def test_an_adapter_is_evaluated_on_its_base(adapters, tmp_path, capsys):
    """As `load` reads it, while who needs a whole model is told to merge it."""
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 20)
    given = ["evaluate", str(adapters / "base"), str(adapters / "one"), f"--text={text}", f"--output={tmp_path}/out"]
    assert main(given) == 0
    models = json.loads((tmp_path / "out/report.json").read_text())["models"]
    bits = [found["metrics"][0]["value"] for found in models]
    assert len(bits) == 2 and bits[0] != bits[1]
    with pytest.raises(UserError, match="is an adapter, and a whole model is wanted here"):
        open_model(str(adapters / "one"))
