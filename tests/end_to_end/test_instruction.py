"""A chat model through its life: tuned, resumed, spoken to, converted; serving renders what training did."""

import dataclasses
import json
import shutil

import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.core.errors import UserError
from t5x_like.data.templates import named
from t5x_like.data.tokenizers import vocabularies
from t5x_like.inference import decode
from tests.data import chats
from tests.end_to_end.commands import ROOT, train, values

ANSWERS = {"a": "one", "b": "two", "c": "three"}
OPTIONS = [
    *("--config.data.fields.messages=messages", "--config.data.chat.template=plain", "--config.data.packing=examples"),
    *("--config.data.validation=", "--config.data.length=96", "--config.data.chat.system=Be short."),
    *("--config.loop.steps=60", "--config.loop.log_every_steps=5", "--config.checkpoint.every_steps=50"),
    "--config.evaluate.every_steps=0",
]


def conversation(*letters):
    pairs = [({"role": "user", "content": a}, {"role": "assistant", "content": ANSWERS[a]}) for a in letters]
    return [message for pair in pairs for message in pair]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    source = chats.write(folder / "a.jsonl", [conversation(a, b) for a in ANSWERS for b in ANSWERS] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train(folder / "run", f"--config.data.source={source}", *OPTIONS) == 0
    return folder / "run"


def test_answers_end_where_those_of_training_do(tuned):
    lm = t5x_like.load(tuned)
    assert lm.vocabulary.chat_template.endswith(named.TEMPLATES["plain"]) and "Be short." in lm.vocabulary.chat_template
    assert (tuned / "tokenizer" / "chat_template.jinja").read_text() == lm.vocabulary.chat_template
    asked = [conversation("a")[:1], conversation("b")[:1], conversation("c", "a")[:3]]
    assert lm.chat(asked, max_new_tokens=20, temperature=0) == ["one", "two", "one"]
    assert lm.chat(asked[2], max_new_tokens=20, temperature=0) == ["one"]
    assert lm.chat([], max_new_tokens=1) == []
    # What is served is what was trained, byte for byte: the prompt, and behind it what generate continues.
    prompt = "Be short.\n\nUser:\na\n\nAssistant:\n"
    assert lm.template.prompt(conversation("a")[:1]).text == prompt
    assert lm.generate(prompt, max_new_tokens=20, temperature=0) == ["one"]


def test_the_command_answers_a_user_or_a_conversation(tuned, capsys):
    whole = json.dumps(conversation("b", "c")[:3])
    command = ["generate", str(tuned), "--chat", "--temperature=0", "--max_new_tokens=9", "--prompt=a"]
    assert main([*command, f"--prompt={whole}"]) == 0
    assert capsys.readouterr().out.splitlines() == ["one", "-" * 40, "three"]


BAD = {
    "a prefix": (["--prompt=a", "--prefix=b"], 2, "--prefix does not go with --chat"),
    "an unknown role": (['--prompt=[{"role": "robot", "content": ""}]'], 1, "message 1 of chat has the role 'robot'"),
    "no messages": (["--prompt=[]"], 1, "chat should be a list of messages, is []"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_conversation_is_one_line(tuned, capsys, case):
    arguments, status, problem = BAD[case]
    assert main(["generate", str(tuned), "--chat", *arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_generation_is_told_of_every_token_that_ends_a_turn(tmp_path, tuned, monkeypatch):
    chats.folder(tmp_path, named.TEMPLATES["chatml"])
    vocabulary = vocabularies.load(tmp_path)
    lm = dataclasses.replace(t5x_like.load(tuned), vocabulary=vocabulary, ends=())
    told = []
    monkeypatch.setattr(decode, "generate", lambda *_, stop_ids, **__: told.append(stop_ids) or [[]])
    lm.chat(conversation("a")[:1], max_new_tokens=2)
    assert told == [[vocabulary.specials["<|im_end|>"], vocabulary.eos_id]] and len(set(told[0])) == 2


def test_a_run_is_asked_by_the_template_of_its_config_where_its_tokenizer_has_none(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / "chat_template.jinja").unlink()
    lm = t5x_like.load(tmp_path / "run")
    assert lm.template.text == t5x_like.load(tuned).template.text
    assert lm.chat(conversation("b")[:1], max_new_tokens=20, temperature=0) == ["two"]


@pytest.mark.parametrize("folder", ["as it is", "no template beside the tokenizer"])
def test_an_evaluation_asks_as_training_did(tuned, tmp_path, folder):
    run = tuned
    if folder != "as it is":
        run = tmp_path / "run"
        shutil.copytree(tuned, run)
        (run / "tokenizer" / "chat_template.jinja").unlink()
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in ANSWERS.items()))
    (tmp_path / "asked.yaml").write_text(
        f"task: asked\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/asked.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {max_gen_toks: 20}\nmetric_list: [{metric: exact_match}]\n"
    )
    command = ["evaluate", str(run), "--tasks=asked", f"--include_path={tmp_path}", f"--output={tmp_path}/report"]
    right = []
    for asked in ([*command, "--chat"], command):
        assert main(asked) == 0
        (metric,) = json.loads((tmp_path / "report" / "report.json").read_text())["models"][0]["metrics"]
        right.append(metric["value"])
    assert right[0] == 1.0 > right[1]  # without the template it is not what it was trained on


def test_a_model_without_a_template_is_one_line(finished):
    with pytest.raises(UserError, match="the model has no chat template: it was trained without config.data.chat"):
        t5x_like.load(finished).chat(conversation("a")[:1], max_new_tokens=3)


def test_a_run_is_resumed_to_the_same_bits(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "run"
    shutil.copytree(tuned, workdir)
    shutil.rmtree(workdir / "checkpoints" / "60")
    manifest = json.loads((workdir / "manifest.json").read_text())
    del manifest["finished"]
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    assert train(workdir, config=None) == 0
    assert values(workdir) == values(tuned)


def test_a_converted_model_has_its_template_and_transformers_renders_the_same(tuned, tmp_path):
    """With the tokenizer of bytes, which transformers has too."""
    transformers = pytest.importorskip("transformers", reason="beside transformers, of the extra [test]")
    assert main(["convert", str(tuned), str(tmp_path / "hf"), "--to=hf"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    messages = conversation("a", "b")[:3]
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    lm = t5x_like.load(tmp_path / "hf")
    assert lm.template.prompt(messages).text == theirs == t5x_like.load(tuned).template.prompt(messages).text
    assert lm.chat(messages, max_new_tokens=20, temperature=0) == ["two"]
