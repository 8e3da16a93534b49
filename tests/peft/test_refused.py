"""Adapters that are no plain LoRA of the base given, and models that an adapter cannot be taken out of."""

import json

import peft
import pytest

from t5x_like.__main__ import main
from t5x_like.convert import convert, native, peft_format
from t5x_like.core.errors import UserError
from t5x_like.runs import adapters
from t5x_like.storage import model_directory
from tests.convert import folders
from tests.peft.test_beside_peft import build

OTHER_KINDS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "loftq": {"init_lora_weights": "loftq"},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["q_proj"]}},
    "arrow": {"arrow_config": {"top_k": 3}},
    "dora": {"use_dora": True},
    "unknown": {"use_something_of_next_year": 1},
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_what_is_no_plain_lora_is_one_line(case, tmp_path):
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"])
    plain.save_pretrained(str(tmp_path))
    place = tmp_path / peft_format.CONFIG
    settings = json.loads(place.read_text())
    stack = {"layers": 1, "heads": 2, "kv_heads": 2, "head_size": 4, "mlp": 8}
    fields = {"vocab_size": 32, "max_length": 16, "width": 8, "decoder": stack}
    config = native.model_config("llama", fields, dtype="float32", where="")
    with pytest.raises(UserError) as missing:  # what peft itself writes goes on to the weights, which are not there
        peft_format.read(str(tmp_path), config)
    assert peft_format.WEIGHTS in str(missing.value)
    place.write_text(json.dumps(settings | OTHER_KINDS[case]))
    with pytest.raises(UserError) as caught:
        peft_format.read(str(tmp_path), config)
    assert next(iter(OTHER_KINDS[case])) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_is_taken_out_of_what_it_was_merged_into_alone(tmp_path, capsys):
    _, saved = build("llama", tmp_path)
    convert.to_native(str(tmp_path / "hf"), str(tmp_path / "base"))
    folders.save("llama_one_layer_tied", tmp_path / "hf_other")
    convert.to_native(str(tmp_path / "hf_other"), str(tmp_path / "other"))
    ours, merged = str(tmp_path / "ours"), str(tmp_path / "merged")
    assert main(["convert", str(saved), ours, f"--base={tmp_path / 'base'}"]) == 0
    assert main(["convert", ours, merged, "--to=native"]) == 0
    assert main(["convert", merged, str(tmp_path / "again"), f"--unmerge={ours}"]) == 0
    capsys.readouterr()
    for source, said in (("base", "never merged"), ("other", "give the model that it was merged into")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / "no"), f"--unmerge={ours}"]) != 0
        told = capsys.readouterr().err
        assert said in told and len(told.splitlines()) == 1 and not (tmp_path / "no").exists()


def test_a_head_that_was_trained_beside_an_adapter_is_not_dropped(tmp_path, monkeypatch):
    place = model_directory.ModelDirectory(str(tmp_path), str(tmp_path / "tokenizer"), (0,))
    trained = {"adapters/layers/mlp/up/a": {}, "heads/reward/weight": {}}
    monkeypatch.setattr(model_directory, "locate", lambda source, step=None: place)
    monkeypatch.setattr(model_directory, "read_metadata", lambda at: {"arrays": {"params": trained}, "base": {}})
    with pytest.raises(UserError, match="trained 'heads/reward/weight' beside its adapter"):
        adapters.to_peft("run", str(tmp_path / "out"), step=None, item="params")
