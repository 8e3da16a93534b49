"""Claims about `t5x_like evaluate` as it is called, and about the tasks that come with it."""

import dataclasses
import json
import pathlib

import pytest

from t5x_like.__main__ import main
from t5x_like.evaluation import harness
from tests.evaluation import worlds

QUESTION = "Please choose the correct answer to the question: Who?\n\n{0}1: a b {0}2: c\n\nAnswer format: {1}1/{1}2"
PLAIN = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A record or two of every file that shipped tasks read, in the forms that these files have."""
    folder = tmp_path_factory.mktemp("data")

    def write(name, text):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def write_lines(name, *records):
        write(name, "".join(json.dumps(record) + "\n" for record in records))

    for name, word in {"ARC-Challenge-test": "Answer", "winogrande-test": "Option", "piqa-test": "Solution"}.items():
        record = {"instruction": QUESTION.format(word, word.lower()), "answer": f"{word.lower()}2"}
        for other in (name, "ARC-Easy-test", "openbookqa-test", "social_i_qa-test"):
            write(f"commonsense_mcq/{other}.json", json.dumps([record]))
    write("commonsense_mcq/boolq-test.json", json.dumps([{"instruction": PLAIN, "answer": "false"}]))
    write_lines(
        "hellaswag_1k/hellaswag.jsonl", {"activity_label": "A", "ctx": "b c", "endings": ["d.", "e."], "label": 1}
    )
    write_lines("lambada/lambada_test.jsonl", {"text": "the last word"})
    for split in ("train", "test"):
        write_lines(f"gsm8k/{split}.jsonl", *({"question": f"{n}?", "answer": f"so\n#### {n}"} for n in range(7)))
    write_lines("nq_open/NQ-open.dev.jsonl", {"question": "who", "answer": ["Bob", "bob b"]})
    write("flores200_devtest/eng_Latn.devtest", "One.\nTwo.\n")
    write("sentiment_sst_trec/stsa.binary.dev", "0 a bad one\n1 a good one\n")
    write("nli_glue_superglue/rte_dev.csv", 'premise,hypothesis,label\n"a\nb",c,not_entailment\n')
    for subject in ("anatomy", "world_history"):
        rows = "".join(f"{subject} {n}?,w,x,y,z,{'ABCD'[n % 4]}\n" for n in range(6))
        write(f"mmlu/dev/{subject}_dev.csv", rows)
        write(f"mmlu/test/{subject}_test.csv", rows)
    write("bbh/bbh/sums.json", json.dumps({"canary": "c", "examples": [{"input": "1 + 1", "target": "2"}]}))
    write("bbh/cot-prompts/sums.txt", "canary\n-----\nAdd.\n\nQ: 0 + 1\nA: So the answer is 1.\n")
    return folder


def test_every_shipped_task_reads_its_data(data, folder_of):
    tasks = harness.Tasks(["local"], include=[], data=str(data))
    shipped = {path.stem for path in harness.SHIPPED.glob("*.yaml") if not path.stem.startswith("_")}
    assert set(tasks.of(tasks.names).load(None)["tasks"]) == {f"local_{name}" for name in shipped}
    settings = worlds.SETTINGS
    found = tasks.evaluate(
        worlds.ours(folder_of("stories")), settings.__class__(**vars(settings) | {"generation": "max_gen_toks=8"})
    )
    first = {task: samples[0] for task, samples in found.samples.items()}
    asked = {task: sample["arguments"][0][0] for task, sample in first.items()}
    target = {task: sample["target"] for task, sample in first.items()}
    assert first["local_winogrande"]["arguments"] == [
        ("Question: Who?\nAnswer:", " a b"),
        ("Question: Who?\nAnswer:", " c"),
    ]
    assert target["local_winogrande"] == 1 and target["local_boolq"] == 1
    assert first["local_boolq"]["arguments"][1] == ("Question: is it?\nAnswer:", " false")
    assert first["local_lambada"]["arguments"] == [("the last", " word")]
    assert asked["local_gsm8k"].count("Question:") == 6 and asked["local_gsm8k"].endswith("0?\nAnswer:")
    assert asked["local_mmlu"].startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
    )
    assert asked["local_mmlu"].count("Answer:") == 6 and "D. z\nAnswer: A\n\nanatomy 1?" in asked["local_mmlu"]
    assert "about world history." in found.samples["local_mmlu"][1]["arguments"][0][0]
    assert asked["local_bbh"].startswith("Add.\n\nQ: 0 + 1\n") and target["local_bbh"] == "2"
    assert target["local_nq_open"] == ["Bob", "bob b"] and target["local_rte"] in (1, "1")
    assert len(found.samples["local_flores_english"]) == 2


def test_two_models_stand_side_by_side_and_a_worse_one_fails(folder_of, tmp_path, capsys):
    """stories260K knows the words that follow better than a model of random weights."""
    worlds.write_tasks(tmp_path)
    good, bad = str(folder_of("stories")), str(folder_of("gpt2"))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl named Lily. She loved to play with her dog. " * 150)
    asked = [
        "--tasks=word,choice",
        f"--include_path={tmp_path}",
        f"--text={text}",
        "--limit=8",
        f"--output={tmp_path}/out",
    ]
    assert main(["evaluate", good, bad, *asked, "--samples"]) == 0
    page = capsys.readouterr().out
    assert f"| {bad} - {good} |" in page and "| choice | acc (higher is better) | 8 |" in page
    assert (tmp_path / "out" / "report.md").read_text() == page
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [each["model"] for each in written["models"]] == [good, bad] and len(written["differences"][bad]) == 10
    (samples,) = pathlib.Path(tmp_path, "out", "samples").glob("*stories*/word.jsonl")
    assert len(samples.read_text().splitlines()) == 8
    assert main(["evaluate", bad, f"--text={text}", f"--fail_if_worse={good}"]) == 1
    assert f"{bad}: text:{text} bits_per_byte is worse by " in capsys.readouterr().err
    stored = f"--fail_if_worse={tmp_path}/out/report.json"
    assert main(["evaluate", bad, f"--text={text}", stored, "--errors=0"]) == 0
    said = capsys.readouterr().err
    assert "0 of 4 metrics worse by more than 0 standard errors" in said
    assert f"word perplexity: only {tmp_path}/out/report.json has it, not compared" in said
    for change, part in {
        "--limit=7": "asked with limit=8, and here it is 7",
        "--num_fewshot=1": "num_fewshot=None",
    }.items():
        other = [each for each in asked[:4] if not each.startswith(change.partition("=")[0])]
        assert main(["evaluate", bad, *other, change, stored]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line, line
    text.write_text(text.read_text().replace("dog", "cat"))  # every place is where it was
    assert main(["evaluate", bad, f"--text={text}", stored]) == 1
    said = capsys.readouterr().err
    assert "bits_per_byte: " in said and ", and 0 are the same and compared; evaluate both on the same files" in said
    assert "it shares no document of any metric with this evaluation" in said
    assert main(["evaluate", good, f"--text={text}", "--length=100000"]) == 2
    assert "--length=100000 is more than max_length=512" in capsys.readouterr().err


def story(folder, **more):
    """A task of generated answers, with more fields."""
    worlds.write_task(folder, "story", worlds.RECORDS["story"][:5])
    place = folder / "story.yaml"
    place.write_text(place.read_text() + "".join(f"{name}: {value}\n" for name, value in more.items()))
    return harness.Tasks(["story"], include=[str(folder)], data="")


def test_examples_before_questions_are_counted_and_their_source_is_said(tmp_path, folder_of, capsys):
    (line,) = story(tmp_path).check(dataclasses.replace(worlds.SETTINGS, shots=2))
    assert line.startswith("story: it has no training split; its 2 examples are documents of its split 'test', the")
    assert story(tmp_path).check(worlds.SETTINGS) == []
    tasks = story(tmp_path, fewshot_split="test", num_fewshot=3)
    assert tasks.check(worlds.SETTINGS) == []
    asked = ["evaluate", str(folder_of("gpt2")), "--tasks=story", f"--include_path={tmp_path}"]
    capsys.readouterr()
    assert main([*asked, "--num_fewshot=9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--tasks=story: 9 examples before each question, and its split 'test' has 5 documents; use --num_f" in line
    assert main([*asked, "--gen_kwargs=max_gen_toks=abc"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--gen_kwargs=max_gen_toks=abc: generation_kwargs.max_gen_toks='abc' should be a number" in line
    found = tasks.evaluate(worlds.ours(folder_of("gpt2")), dataclasses.replace(worlds.SETTINGS, shots=4))
    assert found.shots == {"story": 4}


def test_a_perplexity_beyond_any_number_is_infinite(tmp_path, folder_of, capsys):
    worlds.write_task(tmp_path, "page", [{"text": "oneverylongword" * 40}] * 2)
    asked = ["evaluate", str(folder_of("gpt2")), "--tasks=page", f"--include_path={tmp_path}"]
    assert main([*asked, f"--output={tmp_path}/out"]) == 0
    assert "page word_perplexity is inf, no finite number" in capsys.readouterr().err
    assert '"Infinity"' in (tmp_path / "out" / "report.json").read_text()
