"""Adapters beside the peft package: the same logits and gradients from the same files, there and back."""

import copy
import functools
import json
import pathlib
import shutil
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
from t5x_like.convert import convert, native
from t5x_like.convert.transfer import write_item
from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.core.types import ArraySpec
from t5x_like.models import config as model_config
from t5x_like.objectives import lm
from t5x_like.objectives.interface import policy
from t5x_like.peft import attach
from t5x_like.runs import adapters
from t5x_like.storage import base as bases
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
    "llama with its ends": (
        "llama_grouped",
        {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 6}, "lora_alpha": 12},
    ),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo", "o"], "lora_alpha": 3}),
}
GPT2: dict[str, dict[str, Any]] = {
    "every matrix": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "lora_alpha": 12},
    "the joined one, rsLoRA": {"target_modules": ["c_attn"], "use_rslora": True, "fan_in_fan_out": True},
    "alphas of their own": {
        "target_modules": ["c_attn", "c_fc"],
        "alpha_pattern": {"c_fc": 3, r"h\.0\.attn\.c_attn": 5},
        "fan_in_fan_out": True,
    },
}
CASES |= {f"gpt2, {name}": ("gpt2", fields) for name, fields in GPT2.items()}


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
    adapted = {name: array for name, array in first.items() if "lora_" in name}  # beside copies of the base's ends
    assert adapted.keys() == again.keys() and len(first) - len(adapted) == (2 if "ends" in case else 0)
    for name, array in adapted.items():
        if "c_attn" not in name and "alphas" not in case:
            np.testing.assert_array_equal(array, again[name], err_msg=name)
    base = model.get_base_model().__class__.from_pretrained(folder / "hf", dtype=torch.float32)
    reread = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    assert np.abs(their_logits(reread, case) - theirs).max() <= 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["llama of several ranks", "llama with its ends", "t5"])
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


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("ranks", [(), (("layers/attention/k", 2),), (("layers/attention/v", (0, 3)),)])
def test_queries_keys_and_values_of_gpt2_go_to_the_one_matrix_of_peft_and_back(worlds, tmp_path, stabilized, ranks):
    """Of three adapters of rank r one of rank 3 r, whose alpha keeps the scale."""
    folder, _ = worlds("gpt2, every matrix")
    targets = ["layers/attention/[qkv]", "layers/mlp/up"]
    lora = {"rank": 4, "alpha": 6.0, "rank_stabilized": stabilized, "dropout": 0.0, "targets": targets}
    section = {"name": "lora", "lora": lora | {"ranks": [list(each) for each in ranks]}}
    made(folder / "base", tmp_path / "ours", section)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "saved"), "--to=peft"]) == 0
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    layer = "transformer.h.0.attn.c_attn".replace(".", r"\.")
    rank = settings["rank_pattern"][layer]
    assert rank == {(): 12, "k": 10, "v": 8}[ranks and ranks[0][0][-1]]
    assert settings["alpha_pattern"][layer] == pytest.approx(6 * (rank / 4) ** (0.5 if stabilized else 1))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    theirs = their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval(), "gpt2")
    ours = our_logits(tmp_path / "ours", "gpt2")
    assert np.abs(theirs - our_logits(folder / "base", "gpt2")).max() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "again"), f"--base={folder / 'base'}"]) == 0
    one, two = (adapters.arrays(locate(str(tmp_path / name)).checkpoint, "params") for name in ("ours", "again"))
    np.testing.assert_allclose(our_logits(tmp_path / "again", "gpt2"), ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    if not ranks and not stabilized:
        assert one.keys() == two.keys()
        for path in one:
            np.testing.assert_array_equal(one[path], two[path], err_msg=path)


def made(base: pathlib.Path, target: pathlib.Path, section: dict[str, Any]) -> None:
    """A model directory of an adapter of ours with random A and B on `base`."""
    place = locate(str(base))
    note = read_metadata(place.checkpoint)
    config = model_config.resolve(note["config"]["model"])
    specs = native.model_specs(config)
    adapter = attach.of_stored({"adapter": section}, tree.unflatten(specs))
    assert adapter is not None
    draw = np.random.default_rng(5)
    new = tree.flatten(adapter.specs())
    parts = {path: 0.2 * draw.standard_normal(spec.shape).astype(np.float32) for path, spec in new.items()}
    for path, target_ in adapter.targets.items():  # as training leaves them: what a layer has not is no matter
        scale = target_.scale_R() > 0
        a, b = f"adapters/{path}/a", f"adapters/{path}/b"
        if scale.ndim == 2:
            parts[a] *= scale.reshape(len(scale), *(1,) * (parts[a].ndim - 2), -1)
            parts[b] *= scale.reshape(*scale.shape, *(1,) * (parts[b].ndim - 2))
    shutil.copytree(base / "tokenizer", target / "tokenizer")
    checkpoint = target / "checkpoints" / "0"
    moved = write_item(str(checkpoint / "params"), parts)
    native.complete(
        str(checkpoint),
        config,
        moved,
        provenance=note["provenance"],
        extra={"base": bases.record(place.checkpoint, specs, beside=str(checkpoint))},
        axes={path: list(spec.axes) for path, spec in new.items()},
        sections={"adapter": section},
    )


def test_a_tied_embedding_has_no_module_of_peft(tmp_path):
    """Ours adapts the table, which is both ends; peft's modules are one each."""
    folders.save("llama_one_layer_tied", tmp_path / "hf")
    convert.to_native(str(tmp_path / "hf"), str(tmp_path / "base"))
    lora = {"rank": 2, "alpha": 4.0, "rank_stabilized": False, "dropout": 0.0, "targets": ["embed/tokens"], "ranks": []}
    made(tmp_path / "base", tmp_path / "ours", {"name": "lora", "lora": lora})
    assert np.abs(our_logits(tmp_path / "ours", "llama") - our_logits(tmp_path / "base", "llama")).max() > 0.1
    with pytest.raises(UserError, match=r"'embed/tokens' is both the embedding and the LM head of this model \(tied\)"):
        adapters.to_peft(str(tmp_path / "ours"), str(tmp_path / "saved"), step=None, item="params")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "merged"), "--verify"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(UserError, match="both the embedding and the LM head"):
        adapters.from_peft(str(tmp_path / "theirs"), str(tmp_path / "again"), base=str(tmp_path / "base"))


def test_an_adapter_with_another_embedding_beside_it_is_refused(worlds, tmp_path):
    folder, _ = worlds("llama with its ends")
    shutil.copytree(folder / "saved", tmp_path / "saved")
    tensors = load_file(folder / "saved" / "adapter_model.safetensors")
    name = next(name for name in tensors if "embed_tokens.base_layer" in name)
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "saved" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds another 'embed/tokens' than the model of --base"):
        adapters.from_peft(str(tmp_path / "saved"), str(tmp_path / "ours"), base=str(folder / "base"))


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
