"""Bad input to what follows pretraining: conversations, pairs, classes, adapters and verifiers. One line each."""

import json
import pathlib

import pytest

from t5x_like.__main__ import main
from t5x_like.storage.model_directory import digest
from tests.end_to_end.commands import ROOT, rows, sizes, train


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


TRAINING_ALONE = ["--config.data.validation=", "--config.evaluate.every_steps=0"]
CHAT = [*TRAINING_ALONE, "--config.data.fields.messages=messages", "--config.data.packing=examples"]
CODED = ["--config.data.chat.template=tokenizer", "--config.data.tokenizer={files}/coded"]
DROP = ["--config.data.truncate.rule=drop"]
PAIRS = [*TRAINING_ALONE, "--config.data.packing=single", "--config.data.features=pairs", "--config.objective.name=dpo"]
PAIRS += [f"--config.data.fields.{side}={side}" for side in ("chosen", "rejected")]
PAIRS += ["--config.objective.dpo.reference=none"]
CLASSES = [*TRAINING_ALONE, "--config.data.fields.label=class"]
_ADAPTED = ["--config.checkpoint.init_from={finished}", "--config.checkpoint.holds=trained"]
_LORA = [*_ADAPTED, "--config.adapter.name=lora"]
# {files} holds records that cannot be trained on, {finished} is a finished run, {adapter} an adapter whose base is not
# what it was.
BAD = {
    "a template that runs code": (
        [*CHAT, "--config.data.source=jsonl:{files}/chat.jsonl", *CODED],
        1,
        "config.data.chat.template='tokenizer' is refused: it asks for what no template may do: access to attribute",
    ),
    "a conversation without the assistant": (
        [*CHAT, "--config.data.source=jsonl:{files}/alone.jsonl", "--config.data.chat.template=plain"],
        1,
        "alone.jsonl:1 (byte 0): the conversation of field 'messages' has no turn of the assistant",
    ),
    "a role that is none": (
        [*CHAT, "--config.data.source=jsonl:{files}/role.jsonl", "--config.data.chat.template=plain"],
        1,
        "role.jsonl:1 (byte 0): message 1 of field 'messages' has the role 'usr', which is unknown; did you",
    ),
    "messages that are no list": (
        [*CHAT, "--config.data.source=jsonl:{files}/word.jsonl", "--config.data.chat.template=plain"],
        1,
        "word.jsonl:1 (byte 0): field 'messages' should be a list of messages, is the text 'hello'",
    ),
    "an answer longer than the row": (
        [*CHAT, "--config.data.source=jsonl:{files}/chat.jsonl", "--config.data.chat.template=plain", *DROP],
        1,
        "no token to train on in its rows of 32: the inputs of its 1 examples leave no room for targets",
    ),
    "a template of other tokens": (
        [*CHAT, "--config.data.source=jsonl:{files}/chat.jsonl", "--config.data.chat.template=chatml"],
        2,
        "config.data.chat.template='chatml', and the tokenizer lacks <|im_start|>, <|im_end|>; use 'plain'",
    ),
    "pairs whose prompts differ": (
        [*PAIRS, "--config.data.source=jsonl:{files}/dialogues.jsonl"],
        1,
        "dialogues.jsonl:2 (byte 89): the prompts of a pair differ: two whole dialogues should be the same through",
    ),
    "conversations of a pair whose prompts differ": (
        [*PAIRS, "--config.data.source=jsonl:{files}/conversations.jsonl", "--config.data.chat.template=plain"],
        1,
        "conversations.jsonl:1 (byte 0): the prompts of a pair differ: two conversations should be the same up to",
    ),
    "a class that is none": (
        [*CLASSES, "--config.data.source=jsonl:{files}/classes.jsonl"],
        1,
        "classes.jsonl:2 (byte 29): field 'class' should be a class, a whole number from 0, is -1; mend it, or leave",
    ),
    "an adapter of another base": (
        ["--config.checkpoint.init_from={adapter}"],
        1,
        "was trained on other parameters than its base",
    ),
    "an adapter of no model": (["--config.adapter.name=lora"], 2, "give its directory as config.checkpoint.init_from"),
    "an adapter that is none": ([*_ADAPTED, "--config.adapter.name=lorra"], 2, "did you mean 'lora'"),
    "a field of an adapter that is not named": (["--config.adapter.lora.rank=2"], 2, "config.adapter.name='none'"),
    "an adapter of nothing": (
        [*_LORA, "--config.adapter.lora.targets=('layers/attention/quer',)"],
        2,
        "'layers/attention/quer' matches no matrix of the layers, nor an end; did you mean 'layers/attention/q",
    ),
    "an adapter without rank": ([*_LORA, "--config.adapter.lora.rank=0"], 2, "lora.rank=0 should be at least 1"),
    "an adapter of a rank that no weight has": (
        [*_LORA, "--config.adapter.lora.rank=17"],
        2,
        "rank=17 is more than 'layers/attention/k' has, a matrix of 32 x 16; use at most 16",
    ),
}


@pytest.fixture(scope="module")
def adapter(finished, tmp_path_factory):
    """An adapter on `finished`, which has other parameters than those that its notes speak of."""
    workdir = tmp_path_factory.mktemp("adapter") / "run"
    given = [argument.format(finished=finished) for argument in (*_LORA, "--config.loop.steps=1", *TRAINING_ALONE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train(workdir, *given, "--config.optim.schedule.warmup_steps=0") == 0
    metadata = workdir / "checkpoints/1/metadata/metadata"
    note = json.loads(metadata.read_text())
    note["base"]["fingerprint"] = "0" * len(note["base"]["fingerprint"])
    metadata.write_text(json.dumps(note | {"sha256": digest(note)}))
    return workdir


def _write(folder: pathlib.Path) -> None:
    """Records of each kind, and a tokenizer of bytes whose template runs code."""
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 100}
    chats = {"chat": [user, assistant], "alone": [user], "role": [{"role": "usr", "content": "a"}], "word": "hello"}
    records = {name: [{"messages": messages}] for name, messages in chats.items()}
    said = ["\n\nHuman: a?\n\nAssistant: b", "\n\nHuman: a?\n\nAssistant: c", "\n\nHuman: d?\n\nAssistant: c"]
    records["dialogues"] = [{"chosen": said[0], "rejected": other} for other in said[1:]]
    records["conversations"] = [
        {"chosen": [user, assistant], "rejected": [{"role": "user", "content": "c"}, assistant]},
    ]
    records["classes"] = [{"text": "fine", "class": 0}, {"text": "wrong", "class": -1}]
    for name, each in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in each))
    (folder / "coded").mkdir()
    (folder / "coded" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}')
    (folder / "coded" / "chat_template.jinja").write_text("{{ ().__class__.__base__.__subclasses__() }}")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_loses_nothing(case, finished, adapter, tmp_path, capsys):
    before = sizes(finished)
    _write(tmp_path)
    arguments, status, part = BAD[case]
    arguments = [argument.format(files=tmp_path, finished=finished, adapter=adapter) for argument in arguments]
    assert train(tmp_path / "run", *arguments) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    assert len(errors) == 1 and errors[0].startswith("t5x_like: ") and part in errors[0], errors
    assert not (tmp_path / "run" / "config.json").exists() and sizes(finished) == before


# Each is bad once: it leaves a file behind.
_VERIFIERS = """
import pathlib
import time

from configs.rl import test
from t5x_like.configs import common

HERE = pathlib.Path({folder!r})


def first(name):
    there = (HERE / name).exists()
    (HERE / name).touch()
    return not there


def raises(prompt, answer, expected):
    if first("raised"):
        raise ValueError("no judge")
    return len(answer)


def hangs(prompt, answer, expected):
    if first("hung"):
        time.sleep(3600)
    return len(answer)


def get_config():
    config = test.get_config()
    config.rl.update({{"held_out": 0, "reward_seconds": 1.0, "failure_value": -2.0}})
    for function in (raises, hangs):
        config.rl.rewards[function.__name__] = common.reward("function", function=function)
    return config
"""
BAD_VERIFIERS = {
    "raises": "iteration 0: config.rl.rewards.raises raised ValueError: no judge on the answer '",
    "hangs": "iteration 0: config.rl.rewards.hangs took longer than 1 s (config.rl.reward_seconds) on the answer '",
}


def test_a_verifier_that_raises_or_hangs_is_one_line_and_costs_one_answer(tmp_path, capsys):
    (tmp_path / "own.py").write_text(_VERIFIERS.format(folder=str(tmp_path)))
    given = ["--config.loop.steps=1", "--config.optim.schedule.warmup_steps=0"]
    assert main(["rl", f"--config={tmp_path}/own.py", f"--workdir={tmp_path / 'run'}", *given]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("t5x_like: ")]
    (row,) = (row for row in rows(tmp_path / "run") if "train/loss" in row)
    assert len(said) == len(BAD_VERIFIERS), said
    for name, part in BAD_VERIFIERS.items():
        (line,) = (line for line in said if f"config.rl.rewards.{name} " in line)
        assert line.startswith(f"t5x_like: {part}") and line.endswith("; its value is -2"), line
        assert row[f"train/reward_failures/{name}"] == 1 and row[f"train/reward_std/{name}"] > 0
