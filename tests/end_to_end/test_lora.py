"""An adapter through its life as a user has it: trained on a finished run, resumed, loaded, refused on another base."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_like
from configs.pretrain import test as test_config
from t5x_like.__main__ import main
from t5x_like.compress.quant_array import QuantArray
from t5x_like.convert.stored import open_model
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.layers import weights
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.rules import MESH_AXES
from t5x_like.peft.lora import LoraArray
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.storage.model_directory import digest, read_metadata
from tests.end_to_end.commands import ROOT, train, values

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


@pytest.fixture(scope="module")
def merged(adapters):
    """The adapter "one" as a model directory of its own."""
    assert main(["convert", str(adapters / "one"), str(adapters / "merged"), "--to=native"]) == 0
    return adapters / "merged"


def test_an_adapter_and_its_base_may_be_moved_together(adapters, tmp_path):
    expected = logits(t5x_like.load(str(adapters / "two")))
    for name in ("base", "two"):
        shutil.copytree(adapters / name, tmp_path / "first" / "runs" / name)
    there = tmp_path / "first" / "runs" / "base"
    (there / "checkpoints" / "12").rename(
        there / "checkpoints" / "elsewhere"
    )  # then it is the recorded place that holds
    np.testing.assert_array_equal(logits(t5x_like.load(str(tmp_path / "first/runs/two"))), expected)
    (there / "checkpoints" / "elsewhere").rename(there / "checkpoints" / "12")
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "runs" / "two"
    _forget(moved, adapters)
    np.testing.assert_array_equal(logits(t5x_like.load(str(moved))), expected)
    assert main(["convert", str(moved), str(tmp_path / "merged"), "--to=native"]) == 0
    # A resume goes on naming the base where it is now, if it is not where the run was told to begin.
    assert train(moved, "--config.loop.steps=6", "--config.checkpoint.init_from=/no/such/base", config=None) == 0
    named = read_metadata(str(moved / "checkpoints/6"))["base"]
    assert named["directory"] == str(tmp_path / "moved/runs/base/checkpoints/12")
    assert named["way"] == "../../../base/checkpoints/12"


def _forget(workdir: pathlib.Path, adapters: pathlib.Path, *, way: bool = False) -> None:
    """Makes the recorded place of the base one that is not there; `way`: the way to it too, as it was stored once."""
    for metadata in workdir.glob("checkpoints/*/metadata/metadata"):
        note = json.loads(metadata.read_text())
        assert note["base"]["directory"].startswith(str(adapters))
        note["base"]["directory"] = "/no/such/base/checkpoints/12"
        if way:
            del note["base"]["way"]
        metadata.write_text(json.dumps(note | {"sha256": digest(note)}))


def test_a_base_that_lies_elsewhere_is_found_where_it_is_said_to_be(adapters, merged, tmp_path, capsys):
    run, base = tmp_path / "deep" / "run", tmp_path / "any" / "name"
    shutil.copytree(adapters / "two", run)
    shutil.copytree(adapters / "base", base)
    _forget(run, adapters, way=True)
    assert main(["generate", str(run), "--prompt=a"]) == 1
    assert (
        "needs its base /no/such/base/checkpoints/12, which is not there; move it back, or say where"
        in (capsys.readouterr().err.splitlines()[-1])
    )
    expected = logits(t5x_like.load(str(adapters / "two")))
    for given in (base, base / "checkpoints/12"):
        np.testing.assert_array_equal(logits(t5x_like.load(str(run), base=given)), expected)
    assert main(["generate", str(run), "--prompt=a", "--max_new_tokens=2", f"--base={base}"]) == 0
    with pytest.raises(
        UserError, match="is an adapter of /no/such/.*, and no checkpoint in .*merged has its parameters"
    ):
        t5x_like.load(str(run), base=str(merged))
    # Another adapter on it knows where it is.
    np.testing.assert_array_equal(logits(t5x_like.load(str(run), base=str(adapters / "one"))), expected)
    with pytest.raises(UsageError, match="holds the whole model and names no base"):
        t5x_like.load(str(base), base=str(base))
    assert train(run, "--config.loop.steps=6", "--config.checkpoint.init_from=/no/such/base", config=None) == 1
    assert train(run, "--config.loop.steps=6", f"--config.checkpoint.init_from={base}", config=None) == 0
    np.testing.assert_array_equal(logits(t5x_like.load(str(run))), logits(t5x_like.load(str(run), base=str(base))))


def test_a_run_begins_with_an_adapter_as_with_the_model_it_is_merged_into(adapters, merged, tmp_path, capsys):
    """Bit for bit: the sum is rounded as the conversion rounds it. Nothing of it is a second copy on the disk."""
    for name, source in (("adapter", adapters / "one"), ("merged", merged), ("base", adapters / "base")):
        begin = (f"--config.checkpoint.init_from={source}", "--config.loop.steps=2", STEPS)
        assert train(tmp_path / name, *begin) == 0
        assert "11 of 11 parameters" in capsys.readouterr().out
        # One of those that a pattern chooses, too, with an adapter on it.
        assert train(tmp_path / f"{name}-part", *begin, "--config.checkpoint.init_select=('layers/mlp/up',)") == 0
        assert "1 of 11 parameters" in capsys.readouterr().out
        assert train(tmp_path / f"{name}-lora", *begin, *LORA) == 0
    for kind in ("", "-part", "-lora"):
        adapter, whole, base = (values(tmp_path / f"{name}{kind}") for name in ("adapter", "merged", "base"))
        assert adapter == whole != base
    assert lora(tmp_path / "held", adapters / "one", "--config.loop.steps=2") == 2
    assert "needs a base that is stored whole, and" in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_may_be_a_teacher(adapters, merged, tmp_path):
    losses = {}
    for name, source in (("adapter", adapters / "one"), ("merged", merged), ("base", adapters / "base")):
        given = [f"--config.roles.teacher.source={source}", "--config.loop.steps=2", "--config.seed=3", STEPS]
        assert train(tmp_path / name, *given, config=str(ROOT / "configs/distill/test.py")) == 0
        losses[name] = values(tmp_path / name)
    assert losses["adapter"] == losses["merged"] != losses["base"]
    assert train(tmp_path / "adapter", "--config.loop.steps=3", config=None) == 0  # its parameters are found again


@pytest.mark.parametrize("mesh", [None, "fsdp"])
def test_an_adapter_lies_on_int8_weights(adapters, mesh):
    """What its base computes in int8, and the addition of the adapter in full."""
    config = meshes.MeshConfig(preset="fsdp", rules="", **dict.fromkeys(MESH_AXES))
    given = {} if mesh is None else {"mesh": meshes.make(config, jax.devices()[:2])}
    with jax.set_mesh(given["mesh"]) if given else contextlib.nullcontext():
        one = t5x_like.load(str(adapters / "one"), dtype="int8", **given)
        wrapped = {path: leaf for path, leaf in tree.leaves(one.params) if isinstance(leaf, LoraArray)}
        assert len(wrapped) == 7 and all(isinstance(leaf.base, QuantArray) for leaf in wrapped.values())
        quantized, full = logits(one), logits(t5x_like.load(str(adapters / "one"), **given))
        base = t5x_like.load(str(adapters / "base"), dtype="int8", **given)
        # The same weights written out: int8 rounded once, the addition on it in float32.
        written = tree.map_with_path(lambda _, leaf: weights.dense(leaf, jnp.float32), one.params)
        dense = logits(dataclasses.replace(one, params=written))
        size = np.abs(full).max()
        assert np.abs(quantized - dense).max() <= 1e-5 * size
        assert 1e-5 * size < np.abs(quantized - full).max() <= 0.02 * size
        assert np.abs(quantized - logits(base)).max() > 2 * np.abs(quantized - full).max()
        assert one.generate("To be", max_new_tokens=4, temperature=0.0)
        if mesh is None:
            onto = t5x_like.load(str(adapters / "one"), base=base)
            np.testing.assert_array_equal(logits(onto), quantized)


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
        open_model(str(adapters / "one"))  # by who reads its notes alone; runs/adapters.py merges
