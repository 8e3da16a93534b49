"""Adapters beside the peft package: the same logits and gradients from the same files, there and back."""

import copy
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import t5x_like
from t5x_like.__main__ import main
from t5x_like.convert import convert
from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.core.types import ArraySpec
from t5x_like.objectives import lm
from t5x_like.objectives.interface import policy
from t5x_like.peft import attach
from t5x_like.runs import adapters
from t5x_like.storage.model_directory import locate, read_metadata
from tests.convert import folders

# Name -> (model of tests/convert/folders, fields of peft's LoraConfig).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama_grouped", {"target_modules": "all-linear", "lora_alpha": 12}),
    "llama of several ranks": (
        "llama_grouped",
        {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "o_proj": 6},
            "layers_to_transform": [1, 2],
            "use_rslora": True,
        },
    ),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo", "o"], "lora_alpha": 3}),
}


def build(case: str, folder: pathlib.Path) -> tuple[torch.nn.Module, pathlib.Path]:
    """(the model with peft's adapter, whose B are no zeros, a folder with what peft saves); its base lies in `hf`."""
    name, fields = CASES[case]
    folders.save(name, folder / "hf")
    kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    base = getattr(transformers, kind).from_pretrained(folder / "hf", dtype=torch.float32)
    given: Any = {"r": 4} | fields
    model: Any = peft.get_peft_model(base, peft.LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder / "saved"))
    return model, folder / "saved"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """By case: (folder, peft's model). The folder has `hf`, `base` of it, `saved` by peft, and `ours` made of that."""

    @functools.cache
    def world(case: str) -> tuple[pathlib.Path, torch.nn.Module]:
        folder = tmp_path_factory.mktemp("peft")
        model, saved = build(case, folder)
        convert.to_native(str(folder / "hf"), str(folder / "base"))
        assert main(["convert", str(saved), str(folder / "ours"), f"--base={folder / 'base'}"]) == 0
        return folder, model

    return world


def tokens() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {"inputs": draw.integers(0, 500, (2, 11)), "sources": draw.integers(0, 500, (2, 9))}


def their_logits(model: torch.nn.Module, case: str) -> np.ndarray:
    arrays = {name: torch.tensor(array) for name, array in tokens().items()}
    with torch.no_grad():
        if case != "t5":
            return model(input_ids=arrays["inputs"]).logits.numpy()
        return model(input_ids=arrays["sources"], decoder_input_ids=arrays["inputs"]).logits.numpy()


def our_logits(folder: pathlib.Path, case: str) -> np.ndarray:
    arrays = tokens()
    return t5x_like.load(str(folder)).logits(arrays["inputs"], arrays["sources"] if case == "t5" else None)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft_there_and_back(case, worlds, tmp_path):
    folder, model = worlds(case)
    theirs, plain = their_logits(model, case), our_logits(folder / "base", case)
    ours = our_logits(folder / "ours", case)
    assert np.abs(theirs - plain).max() > 0.1, "the adapter changes something"
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert main(["convert", str(folder / "ours"), str(tmp_path / "back"), "--to=peft"]) == 0
    first, again = (load_file(path / "adapter_model.safetensors") for path in (folder / "saved", tmp_path / "back"))
    assert first.keys() == again.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
    base = model.get_base_model().__class__.from_pretrained(folder / "hf", dtype=torch.float32)
    reread = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    assert np.abs(their_logits(reread, case) - theirs).max() <= 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["llama of several ranks", "t5"])
def test_a_merged_model_is_the_adapted_one_up_to_rounding(case, worlds, tmp_path, capsys):
    folder, model = worlds(case)
    theirs, ours = their_logits(model, case), our_logits(folder / "ours", case)
    assert main(["convert", str(folder / "ours"), str(tmp_path / "hf"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "of which rounding lost" in said and "largest difference of logits, merged and not" in said
    assert main(["convert", str(folder / "ours"), str(tmp_path / "native"), "--to=native"]) == 0
    merged = our_logits(tmp_path / "native", case)
    np.testing.assert_array_equal(merged, our_logits(tmp_path / "hf", case))
    assert np.abs(merged - ours).max() <= 1e-5 * np.abs(theirs).max()
    by_peft = copy.deepcopy(model).merge_and_unload()
    assert np.abs(their_logits(by_peft, case) - merged).max() <= 1e-5 * np.abs(theirs).max()
    out = [str(tmp_path / "native"), str(tmp_path / "base"), f"--unmerge={folder / 'ours'}"]
    assert main(["convert", *out]) == 0
    assert "taken out of" in capsys.readouterr().out
    back, before = our_logits(tmp_path / "base", case), our_logits(folder / "base", case)
    assert np.abs(back - before).max() <= 1e-5 * np.abs(before).max()


def test_gradients_are_those_of_peft(worlds, tmp_path):
    """Of the mean cross entropy, on the same Llama, by its own objective."""
    folder, theirs = worlds("llama")
    ids = tokens()["inputs"]
    inputs, targets = torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:])
    logits = theirs(input_ids=inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()

    lm_model = t5x_like.load(str(folder / "base"))
    model, place = lm_model.model, locate(str(folder / "ours"))
    adapter = attach.of_stored(read_metadata(place.checkpoint)["config"], model.specs())
    assert adapter is not None
    parts = adapters.arrays(place.checkpoint, "params")
    params = {attach.ROOT: tree.unflatten({path: jnp.asarray(part) for path, part in parts.items()})}
    arrays = {
        name: ArraySpec((2, 10), "int32", ("batch", "length"))
        for name in ("inputs", "targets", "loss_weights", "target_bytes")
    }
    role = policy(model, adapter.attach)
    objective = lm.build(lm.LmConfig(z_loss=0.0, label_smoothing=0.0), {"policy": role}, arrays)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    batch = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}
    batch |= {"loss_weights": jnp.ones((2, 10)), "target_bytes": jnp.ones((2, 10), jnp.int32)}
    totals = objective.weights(batch)
    function = jax.jit(jax.value_and_grad(lambda p, f: objective.loss(p, f, batch, None, totals)[0]))
    value, gradients = function(params, {"base": lm_model.params})
    assert float(value) == pytest.approx(loss.item(), rel=1e-6)
    # Written as peft writes an adapter, gradients have its names and shapes.
    named = {path: np.asarray(leaf) for path, leaf in tree.leaves(gradients[attach.ROOT])}
    adapters.write_peft(str(tmp_path / "gradients"), str(folder / "ours"), named)
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    found = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(found) == len(ours) == 2 * 7 * 3
    for name, gradient in found.items():
        mine = ours[name.replace(".default", "")]
        assert np.abs(gradient).max() > 0
        assert np.abs(mine - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


BAD = {
    "another kind": ({"peft_type": "IA3"}, {}, "peft_type='IA3' is not read"),
    "a magnitude": ({"use_dora": True}, {}, "use_dora=True is not read"),
    "a bias": ({"bias": "all"}, {}, "bias='all' is not read"),
    "another model": ({}, {"a": (4, 7)}, "it belongs to another model"),
    "a module that is not there": ({}, {"name": "x_proj"}, "is no module of this model's layers"),
    "a rank of nothing": ({"r": 0}, {}, "r=0 should be a number above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_adapter_of_this_model_is_one_line(case, worlds, tmp_path):
    folder, _ = worlds("llama")
    fields, change, part = BAD[case]
    (tmp_path / "saved").mkdir()
    settings = json.loads((folder / "saved" / "adapter_config.json").read_text())
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps(settings | fields))
    tensors = load_file(folder / "saved" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = (tensors.pop(f"{module}.lora_{side}.weight") for side in "AB")
    a = np.zeros(change["a"], np.float32) if "a" in change else a
    module = module.replace("up_proj", change.get("name", "up_proj"))
    tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(tensors, tmp_path / "saved" / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        adapters.from_peft(str(tmp_path / "saved"), str(tmp_path / "ours"), base=str(folder / "base"))
    assert part in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()
