"""Bad input to the commands that export, convert or evaluate a model ends in one line and the right status, and loses
nothing that was there."""

import json
import shutil
import sys

import pytest
from safetensors.numpy import load_file, save_file

from t5x_like.__main__ import main
from t5x_like.convert import convert
from tests.convert import folders as hugging_face
from tests.end_to_end.commands import ROOT


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


# {files} holds models: "gpt2" of ours, "theirs", which is exported, changed copies of it, and a folder "full".
BAD_EXPORT = {
    "a form that is none": (["export", "{finished}", "{new}", "--format=compressed-tensor"], 2, "did you mean"),
    "no form": (["export", "{finished}", "{new}"], 2, "--format"),
    "a float type that is none": (["export", "{finished}", "{new}", "--format=hf", "--dtype=fp8"], 2, "is unknown"),
    "a family of no table": (
        ["export", "{files}/gpt2", "{new}", "--format=compressed-tensors"],
        1,
        "is a model of the family gpt2, which --format=compressed-tensors does not write; it writes llama",
    ),
    "a folder that exists": (
        ["export", "{finished}", "{files}/full", "--format=hf"],
        2,
        "exists; give the name of a new",
    ),
    "a folder of Hugging Face": (["export", "{files}/theirs", "{new}", "--format=hf"], 1, "make one of ours first"),
    "no model": (["export", "{files}/none", "{new}", "--format=hf"], 1, "is no model directory"),
    "a checksum that differs": (["convert", "{files}/damaged", "{new}"], 1, "is not what SHA256SUMS says"),
    "one that is only used": (["generate", "{files}/damaged", "--prompt=a"], 1, "is not what SHA256SUMS says"),
    "a file that a checksum names": (["convert", "{files}/short", "{new}"], 1, "generation_config.json: no such file"),
    "weights of other bits": (
        ["convert", "{files}/bits", "{new}"],
        1,
        "expected compressed-tensors with 8-bit integer weights, one scale a channel",
    ),
    "a packed weight without its scale": (["convert", "{files}/scaleless", "{new}"], 1, "up_proj.weight' is missing"),
}


@pytest.fixture(scope="module")
def exports(finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    hugging_face.save("gpt2", root / "gpt2-theirs")
    convert.to_native(str(root / "gpt2-theirs"), str(root / "gpt2"))
    assert main(["export", str(finished), str(root / "theirs"), "--format=compressed-tensors"]) == 0
    for name in ("damaged", "short", "bits", "scaleless"):
        shutil.copytree(root / "theirs", root / name)
    content = bytearray((root / "damaged/model.safetensors").read_bytes())
    content[-5] ^= 1
    (root / "damaged/model.safetensors").write_bytes(content)
    (root / "short/generation_config.json").unlink()
    for name in ("bits", "scaleless"):
        (root / name / "SHA256SUMS").unlink()
    settings = json.loads((root / "bits/config.json").read_text())
    settings["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (root / "bits/config.json").write_text(json.dumps(settings))
    tensors = load_file(root / "scaleless/model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight_scale")
    save_file(tensors, root / "scaleless/model.safetensors")
    (root / "full").mkdir()
    (root / "full/mine").write_text("kept")
    return root


@pytest.mark.parametrize("case", BAD_EXPORT)
def test_a_bad_export_or_folder_is_one_line_and_leaves_nothing(case, exports, finished, tmp_path, capsys):
    arguments, status, part = BAD_EXPORT[case]
    given = {"files": exports, "finished": finished, "new": tmp_path / "new"}
    assert main([argument.format(**given) for argument in arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x_like: ") and part in line, line
    assert not list(tmp_path.iterdir()) and (exports / "full/mine").read_text() == "kept"


_CHOICE = "task: mine\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
_CHOICE += (
    "doc_to_target: 0\ndoc_to_choice: [a, b]\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
)
# {files} holds tasks of ours, one of which reads a file that is not there; {finished} is a finished run.
BAD_EVALUATION = {
    "no tasks and no text": (["{finished}"], 2, "give --tasks=NAME,NAME or --text=PATH"),
    "a task that is none": (["{finished}", "--tasks=local_helaswag"], 2, "did you mean 'local_hellaswag'"),
    "a folder of tasks that is none": (["{finished}", "--tasks=a", "--include_path=no/such"], 1, "no such folder"),
    "a shipped task without data": (["{finished}", "--tasks=local_gsm8k"], 1, "give --data=FOLDER"),
    "a folder without a task's data": (
        ["{finished}", "--tasks=local_gsm8k", "--data={files}"],
        1,
        "has no gsm8k/test.jsonl, which the task reads",
    ),
    "a task file without its data": (["{finished}", "--tasks=lost", "--include_path={files}"], 1, "missing.jsonl"),
    "a text that is not there": (["{finished}", "--text=no/such.txt"], 1, "no/such.txt: no such file"),
    "a kind of text that is none": (["{finished}", "--text=jsonl:"], 2, "should be KIND:PATH"),
    "a model that is not there": (["no/such", "--text={files}/a.txt"], 1, "no/such is no model directory"),
    "a model without a tokenizer": (["{files}/bare", "--text={files}/a.txt"], 1, "holds no tokenizer"),
    "a model given twice": (["{finished}", "{finished}", "--text=a"], 2, "a model is given twice"),
    "no template of a chat": (
        ["{finished}", "--tasks=mine", "--chat", "--include_path={files}/good"],
        1,
        "no chat tem",
    ),
    "a batch of nothing": (["{finished}", "--text=a", "--batch_tokens=0"], 2, "--batch_tokens=0 should be at least 1"),
    "a report that is none": (["{finished}", "--text={files}/a.txt", "--fail_if_worse={files}/a.json"], 1, "no report"),
    "a mesh of no axis": (["{finished}", "--text={files}/a.txt", "--mesh=fspd=2"], 2, "'fspd=2' should be AXIS=SIZE"),
    "a room that is too small": (
        ["{finished}", "--tasks=long", "--include_path={files}/good"],
        2,
        "task long: {finished}: max_gen_toks=256 leaves no room for a context in this model's max_length=128",
    ),
    "an answer longer than the model": (
        ["{finished}", "--tasks=wide", "--include_path={files}/good"],
        1,
        "an answer of 301 tokens is longer than this model's max_length=128",
    ),
}


@pytest.fixture(scope="module")
def evaluation_files(finished, tmp_path_factory):
    files = tmp_path_factory.mktemp("evaluation")
    (files / "good").mkdir()
    (files / "a.txt").write_text("some text")
    (files / "a.json").write_text("{}")
    (files / "lost.yaml").write_text(_CHOICE.format(file=files / "missing.jsonl").replace("mine", "lost"))
    (files / "good" / "a.jsonl").write_text(json.dumps({"q": "a"}) + "\n")
    good = _CHOICE.format(file=files / "good" / "a.jsonl")
    (files / "good" / "mine.yaml").write_text(good)
    (files / "good" / "wide.yaml").write_text(good.replace("mine", "wide").replace("[a, b]", f"[{'a' * 300}, b]"))
    long = good.replace("mine", "long").replace(
        "multiple_choice", "generate_until\nmetric_list: [{metric: exact_match}]"
    )
    (files / "good" / "long.yaml").write_text(long.replace("doc_to_choice: [a, b]\n", ""))
    shutil.copytree(finished, files / "bare")
    shutil.rmtree(files / "bare" / "tokenizer")
    return files


@pytest.mark.parametrize("case", BAD_EVALUATION)
def test_what_cannot_be_evaluated_is_one_line(case, finished, evaluation_files, capsys):
    arguments, status, part = BAD_EVALUATION[case]
    values = {"finished": finished, "files": evaluation_files}
    assert main(["evaluate", *(argument.format(**values) for argument in arguments)]) == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("t5x_like: ")]
    assert part.format(**values) in line, line


def test_tasks_without_the_harness_name_the_extra(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(finished), "--tasks=local_hellaswag"]) == 1
    assert "t5x_like: tasks need lm_eval; pip install 't5x_like[eval]'" in capsys.readouterr().err
