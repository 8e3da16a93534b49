"""From compute to a model of a family and a run of it: proportions, what fits, and overrides that are understood."""

import json

import pytest

from t5x_like.__main__ import main
from t5x_like.configs import common
from t5x_like.core.errors import UserError
from t5x_like.runs import sizing
from t5x_like.runs.arguments import load_config
from t5x_like.runs.footprint import Footprints
from t5x_like.runs.planned import experiment_of

LENGTH = 512


@pytest.fixture(scope="module")
def llamas():
    return sizing.of_family("llama", common.config().model, length=LENGTH)


def test_sizes_are_in_order_and_count_attention(llamas):
    assert [each.parameters for each in llamas] == sorted(each.parameters for each in llamas)
    known = {each.name: each.parameters for each in llamas}
    assert known["8b"] == pytest.approx(8.03e9, rel=1e-3) and known["2_13b"] == pytest.approx(13.0e9, rel=1e-2)
    large = next(each for each in llamas if each.name == "8b")
    assert 6 * (large.parameters - 128_256 * 4096) < large.train_flops < 6.3 * large.parameters


@pytest.mark.parametrize("target", [300e6, 3e9, 30e9, 300e9])
def test_a_model_of_any_size_has_proportions_of_the_family(llamas, target):
    found = sizing.shaped("llama", common.config().model, target, llamas, length=LENGTH)
    assert found.parameters == pytest.approx(target, rel=0.15)
    stack = found.config.stack("decoder")
    assert found.config.width % 128 == 0 and stack.mlp % 256 == 0 and stack.heads % stack.kv_heads == 0
    assert stack.heads * stack.head_size == pytest.approx(found.config.width, rel=0.1)
    assert 50 < found.config.width / stack.layers < 250


def run_of(rows=64):
    config = common.config()
    config.model.update({"family": "llama", "size": "mini", "max_length": LENGTH})
    config.data.update({"batch_size": rows, "length": LENGTH})
    return experiment_of(config.to_dict(), {})


def test_memory_decides_remat_and_micro_batches():
    footprints = Footprints(platform="tpu", kind="TPU v5 lite")
    roomy = sizing.place(run_of(), 4, 2**36, footprints)
    assert (roomy.experiment.model.remat, roomy.experiment.loop.micro_batches) == ("none", 1)
    assert (roomy.sizes["fsdp"], roomy.sizes["tensor"]) == (4, 1)
    tight = sizing.place(run_of(), 4, roomy.footprint.total // 3, footprints)
    assert tight.footprint.total < roomy.footprint.total // 3
    assert (tight.experiment.model.remat, tight.experiment.loop.micro_batches) != ("none", 1)
    with pytest.raises(UserError, match="nothing fits: with full remat .* give more --chips"):
        sizing.place(run_of(rows=4), 4, 2**20, footprints)


def test_the_command_gives_overrides_that_a_config_takes(capsys, tmp_path):
    path = tmp_path / "budget.json"
    arguments = ["--chips=v5e:2x2", "--days=1", "--family=llama", f"--length={LENGTH}", f"--json={path}"]
    assert main(["plan", "--budget", *arguments]) == 0
    text = capsys.readouterr().out
    assert "llama at this compute" in text and "  own  " in text and "memory of a device before any compile" in text
    run = json.loads(path.read_text())["run"]
    flags = [flag for flag in run["flags"] if flag.startswith("--config.")]
    experiment = experiment_of(*load_config(["--config=pretrain/llama3_8b", *flags]))
    tokens = experiment.loop.steps * experiment.data.batch_size * LENGTH
    own = next(size for size in json.loads(path.read_text())["fits"][0]["sizes"] if size["name"] == "own")
    assert tokens == pytest.approx(own["tokens"], rel=0.01)


@pytest.mark.parametrize(
    ("family", "says"),
    [("lama", "--family=lama is unknown; there are gpt2, llama"), ("t5", "--family=t5 has an encoder")],
)
def test_a_family_that_has_no_decoder_alone_is_refused(capsys, family, says):
    assert main(["plan", "--budget", "--flops=1e20", f"--family={family}"]) == 2
    assert says in capsys.readouterr().err
