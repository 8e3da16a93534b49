"""tools/lifecycle on a miniature: what is skipped, what runs again, what goes on, and what the table and page say."""

import importlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from t5x_like.configs.lifecycle import data, lora, models, tasks, tiny
from t5x_like.core.errors import UsageError, UserError
from t5x_like.evaluation import report as reports
from t5x_like.evaluation.results import Evaluation, Metric
from t5x_like.evaluation.statistics import mean
from t5x_like.runs import train as experiments
from t5x_like.runs.functions import named_functions
from t5x_like.runs.rl_program import RlExperiment
from tools.lifecycle import __main__ as lifecycle
from tools.lifecycle import collect, measures, page, runner, stages

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A command that counts to 5 in the file count of its folder and goes on from there; it ends with 75 when asked to.
COUNTS = """
import pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
count = folder / "count"
done = int(count.read_text()) if count.exists() else 0
with open(folder / "starts", "a") as file:
    file.write(f"{done}\\n")
for number in range(done + 1, 6):
    time.sleep(float(sys.argv[2])); count.write_text(str(number))
    if stop: sys.exit(75)
"""
COPIES = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text(pathlib.Path(sys.argv[1]).read_text() * 2)"


def miniature(folder, *, pause=0.0):
    """Two stages: one that counts, and one that copies the count and the file `input`."""
    counted, copied = f"{folder}/counted", f"{folder}/copied"
    return [
        stages.Stage("count", "counts", ("-c", COUNTS, counted, str(pause)), (), counted, resumes=True),
        stages.Stage("copy", "copies", ("-c", COPIES, f"{folder}/input", copied), (counted, f"{folder}/input"), copied),
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "input").write_text("a")
    return str(tmp_path)


def starts(folder):
    return pathlib.Path(folder, "counted", "starts").read_text().split()


def test_what_is_done_is_skipped_and_a_changed_input_runs_what_depends_on_it(folder, capsys):
    graph = miniature(folder)
    runner.run(graph, folder)
    assert pathlib.Path(folder, "copied").read_text() == "aa" and starts(folder) == ["0"]
    capsys.readouterr()
    runner.run(graph, folder)
    assert capsys.readouterr().out.count("done before") == 2 and starts(folder) == ["0"]
    pathlib.Path(folder, "input").write_text("b")
    runner.run(graph, folder)
    assert capsys.readouterr().out.count("done before") == 1
    assert pathlib.Path(folder, "copied").read_text() == "bb" and starts(folder) == ["0"]


def test_another_command_begins_anew_and_so_does_a_stage_whose_output_is_gone(folder):
    runner.run(miniature(folder), folder)
    runner.run(miniature(folder, pause=0.001), folder)
    assert starts(folder) == ["0"]  # of a new folder: the old one was removed
    os.remove(f"{folder}/copied")
    runner.run(miniature(folder, pause=0.001), folder)
    assert pathlib.Path(folder, "copied").read_text() == "aa"


def test_what_lies_elsewhere_is_never_removed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    stage = stages.Stage("count", "counts", ("-c", COUNTS, str(elsewhere), "0"), (), str(elsewhere))
    runner.run([stage], folder)
    again = stages.Stage("count", "counts", ("-c", COUNTS, str(elsewhere), "0.0"), (), str(elsewhere))
    runner.run([again], folder)
    assert (elsewhere / "starts").read_text().split() == ["0", "5"]


def _other_process(folder):
    config = pathlib.Path(folder, "config.py")
    config.write_text(
        "def get_stages(folder):\n"
        f"    command = ['-c', {COUNTS!r}, f'{{folder}}/counted', '0.4']\n"
        "    made = {'makes': f'{folder}/counted', 'resumes': True}\n"
        "    return [{'name': 'count', 'says': 'counts', 'command': command} | made]\n"
    )
    command = [sys.executable, "-m", "tools.lifecycle", f"--config={config}", f"--folder={folder}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_count(folder, least, process):
    path = pathlib.Path(folder, "counted", "count")
    for _ in range(600):
        if path.exists() and (path.read_text() or "0") >= str(least):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("it does not count")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_stopped_anywhere_it_goes_on(folder, sent, status):
    process = _other_process(folder)
    _wait_for_count(folder, 2, process)
    process.send_signal(sent)
    assert process.wait(30) == status
    process.stdout.close()
    time.sleep(1.0)  # the command of a runner that was killed is asked to stop, and does
    begun = int(pathlib.Path(folder, "counted", "count").read_text())
    assert 2 <= begun < 5
    again = _other_process(folder)
    output = again.communicate(timeout=60)[0]
    assert again.returncode == 0 and "(goes on)" in output
    assert starts(folder) == ["0", str(begun)]
    record = json.loads(pathlib.Path(folder, "stages", "count.json").read_text())
    assert record["done"] and record["starts"] == 2 and record["seconds"] > 0.4 and record["cpu_seconds"] > 0


def test_a_run_that_has_saved_is_started_again_by_itself(folder):
    ends = COUNTS.replace("    if stop: sys.exit(75)", "    if number < 5: sys.exit(75)")
    stage = stages.Stage(
        "count", "counts", ("-c", ends, f"{folder}/counted", "0"), (), f"{folder}/counted", resumes=True
    )
    runner.run([stage], folder)
    assert starts(folder) == ["0", "1", "2", "3", "4"] and runner.record_of(stage, folder)["starts"] == 5


def test_a_command_that_fails_is_one_line_and_is_tried_again_next_time(folder):
    graph = miniature(folder)
    os.remove(f"{folder}/input")
    with pytest.raises(UserError, match="the stage 'copy' reads .*counted, which is not there"):
        stages.fingerprint(graph[1])
    wrong = stages.Stage("wrong", "fails", ("-c", "raise SystemExit('no such thing')"))
    with pytest.raises(
        UserError, match=r"the stage 'wrong' failed with status 1; its last line: no such thing \(.*txt\)"
    ):
        runner.run([wrong], folder)
    assert not runner.record_of(wrong, folder)["done"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"name": "a", "says": "x"}], "the stage 'a' lacks command"),
        ([{"name": "a", "says": "x", "command": ["-c"], "output": "b"}], "a stage has the field 'output'"),
        ([{"name": "a", "says": "x", "command": ["-c"]}] * 2, "two stages are named 'a'"),
        ([{"name": "a", "says": "x", "command": ["-c"], "reads": ["nowhere"]}], "reads nowhere, which no stage makes"),
        (
            [
                {"name": "a", "says": "x", "command": ["-c"], "reads": ["out"]},
                {"name": "b", "says": "x", "command": ["-c"], "makes": "out"},
            ],
            "reads out, which a later stage makes",
        ),
    ],
)
def test_a_graph_that_cannot_run_is_refused(tmp_path, given, message):
    config = tmp_path / "config.py"
    config.write_text(f"def get_stages(folder):\n    return {given!r}\n")
    with pytest.raises(UsageError, match=message):
        stages.read(str(config), str(tmp_path))


def test_wrong_use_is_one_line(tmp_path, capsys):
    assert lifecycle.main([f"--config={tmp_path}/none.py"]) == 2
    (tmp_path / "empty.py").write_text("")
    assert lifecycle.main([f"--config={tmp_path}/empty.py"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "there is no such file" in lines[0] and "has no function get_stages" in lines[1]


def test_two_in_one_folder_are_refused(folder):
    os.makedirs(f"{folder}/stages")
    with runner._alone(folder), pytest.raises(UserError, match="another lifecycle runs in this folder"):
        with runner._alone(folder):
            pass


# Intervals.


def report(path, values, *, task="t", metric="exact_match"):
    """As `t5x_like evaluate` writes it."""
    items = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    documents = tuple(str(number) for number in range(len(items)))
    found = Metric(task, metric, "none", 0.0, None, None, items, documents, mean)
    reports.write(reports.Report({}, [Evaluation("m", (found,), {}, 0, {})], {}), str(path), samples=False)
    return str(path / "report.json")


def paired(before, after, *, metric="exact_match"):
    return {"kind": "paired", "label": "x", "metric": metric, "tasks": ["t"], "before": before, "report": after}


def test_intervals_hold_the_true_difference_as_often_as_they_say(tmp_path):
    """400 draws of 60 paired answers: rates of 0.4 and 0.6, whose difference is 0.2."""
    chance, inside = random.Random(1), 0
    for _ in range(400):
        hard = [chance.random() for _ in range(60)]
        before = report(tmp_path / "a", [float(each < 0.4) for each in hard])
        after = report(tmp_path / "b", [float(each < 0.4 or chance.random() < 1 / 3) for each in hard])
        found = measures.gain(paired(before, after))
        inside += found.low <= 0.2 <= found.high
    assert 0.91 <= inside / 400 <= 0.98


def test_bits_per_byte_are_sums_by_sums_and_less_is_better(tmp_path):
    before = report(tmp_path / "a", [[-20.0, 10], [-10.0, 10], [-30.0, 20]], metric="bits_per_byte")
    after = report(tmp_path / "b", [[-10.0, 10], [-5.0, 10], [-15.0, 20]], metric="bits_per_byte")
    found = measures.gain(paired(before, after, metric="bits_per_byte"))
    assert (round(found.before, 4), round(found.after, 4)) == (2.1640, 1.0820)
    assert found.difference == pytest.approx(found.after - found.before) and found.verdict == "better"
    assert found.low < found.difference < found.high < 0


def test_a_difference_without_evidence_is_said_to_be_none(tmp_path):
    before, after = report(tmp_path / "a", [1.0, 0.0, 1.0, 0.0]), report(tmp_path / "b", [1.0, 1.0, 1.0, 0.0])
    found = measures.gain(paired(before, after))
    assert found.difference == 0.25 and found.verdict == "no change shown"
    renamed = report(tmp_path / "d", [1.0, 1.0, 1.0, 1.0], metric="chosen")
    assert measures.gain(paired(before, renamed, metric="chosen") | {"before_metric": "exact_match"}).difference == 0.5
    with pytest.raises(UserError, match="no exact_match of t"):
        measures.gain(paired(before, report(tmp_path / "c", [1.0], task="other")))


def test_a_share_is_compared_with_guessing(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 1, "accuracy": 0.5}\n{"step": 2, "accuracy": 0.7, "loss": 1}\n{"step": 3, "loss": 1}\n'
    )
    (tmp_path / "records.jsonl").write_text("{}\n" * 100)
    given = {"kind": "share", "label": "x", "metrics": str(metrics), "metric": "accuracy", "chance": 0.5}
    given["records"] = str(tmp_path / "records.jsonl")
    found = measures.gain(given)
    # Wilson's interval of 70 of 100: [0.6042, 0.7811]
    assert (round(found.low, 4), round(found.high, 4), found.verdict) == (0.1042, 0.2811, "better")


def test_table_and_page_have_costs_gains_curves_and_samples(folder):
    before = report(pathlib.Path(folder, "before.json"), [0.0] * 30)
    after = report(pathlib.Path(folder, "after.json"), [1.0] * 20 + [0.0] * 10)
    sample = {"arguments": [["<2 + 2>", {}]], "filtered_resps": ["5"], "target": "4"}
    rows = '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": "NaN"}\n'
    run = pathlib.Path(folder, "run")
    writes = (
        f"import pathlib; run = pathlib.Path({str(run)!r}); run.mkdir(); (run / 'metrics.jsonl').write_text({rows!r}); "
        f"(run / 'asked.jsonl').write_text({json.dumps(sample)!r})"
    )
    stage = stages.Stage(
        *("learn", "learns", ("-c", writes), (), str(run), True),
        curves=("train/loss",),
        gains=(paired(before, after),),
        samples=(f"{run}/ask*.jsonl",),
    )
    graph = [stage, *miniature(folder)]
    runner.run(graph, folder)
    table = lifecycle.report(graph, folder)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == ["| learn", "| count", "| copy", "| all"]
    assert "| x | 30 | 0.000 | 0.667 | +0.667 [+0.488, +0.846] | better |" in table
    content = pathlib.Path(folder, "report.html").read_text()
    assert content.count("<svg") == 2 and "&lt;2 + 2&gt;" in content and "<td>5</td><td>4</td>" in content
    assert "://" not in content and "src=" not in content  # it stands alone
    assert page.markdown([]).startswith("| stage |")


# The shipped lifecycle.


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_shipped_stages_can_run_in_their_order(tmp_path, kind):
    graph = stages.read(f"configs/lifecycle/tiny.py:{kind}", str(tmp_path))
    assert [stage.name for stage in graph if not stage.name.startswith("evaluate")] == [
        *("data", "pretrain", "instruct", "lora", "full", "merge", "collect", "reward", "dpo", "grpo", "judge"),
        *("export", "sample"),
    ]
    made = {stage.makes for stage in graph}
    for stage in graph:
        for given in stage.gains:
            for name in ("metrics", "records", "report", "before"):
                assert name not in given or made & {str(each) for each in pathlib.Path(given[name]).parents}


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("name", ["instruct", "lora", "full", "reward", "dpo", "grpo"])
def test_the_configs_of_the_shipped_stages_are_sound(name, kind):
    config = importlib.import_module(f"configs.lifecycle.{name}").get_config(f"{kind},F")
    if name == "grpo":
        config, _, _ = named_functions(config.to_dict())
        assert experiments.built(RlExperiment, config).rl.answers == 160
    else:
        assert experiments.from_config(config).model.family == kind


@pytest.mark.parametrize("task", [*tasks.RULES])
def test_held_out_questions_are_in_no_run(task):
    seen = {part: [tasks.example(task, held_out=part, seed=0, index=i) for i in range(300)] for part in (False, True)}
    questions = {part: {each.question for each in found} for part, found in seen.items()}
    assert len(questions[True]) > 60 and not questions[True] & questions[False]
    assert seen[True][:5] == [tasks.example(task, held_out=True, seed=0, index=i) for i in range(5)]


def test_answers_are_those_of_the_rules():
    chance = random.Random(3)

    def twice(letters):
        return [each for each in letters for _ in range(2)]

    rules = {
        **{"reverse": lambda x: x[::-1], "sort": sorted, "repeat": list, "double": twice},
        **{"down": lambda x: sorted(x)[::-1], "least": min, "greatest": max, "ends": lambda x: [min(x), max(x)]},
    }
    for _ in range(20):
        for task, rule in rules.items():
            question, answer = tasks.RULES[task](chance)
            assert answer.split() == list(rule(question.partition(": ")[2].split()))
        for task in ("without", "count", "sort_without"):
            question, answer = tasks.RULES[task](chance)
            name, _, letters = question.partition(": ")
            wanted = name[-1]
            assert wanted in letters or task == "count"
            kept = [each for each in letters.split() if each != wanted]
            kept = sorted(kept) if task == "sort_without" else kept
            assert answer == (str(letters.count(wanted)) if task == "count" else " ".join(kept))

    for kind in models.KINDS.values():
        assert set(tasks.CARELESS[kind]) <= set(kind.tasks) and set(kind.all_tasks) <= set(tasks.RULES)
    asked = tasks.Example("reverse", "Reverse: b a c", "c a b")
    shown = [tasks.demonstrated(models.LLAMA, asked, number) for number in range(40)]
    assert shown.count("b a c") == 22 and shown.count("c a b") == 18
    assert tasks.demonstrated(models.T5, tasks.Example("down", "Down: b a c", "c b a"), 0) == "a b c"
    assert tasks.demonstrated(models.LLAMA, tasks.Example("repeat", "Repeat: b a", "b a"), 0) == "b a"
    assert tasks.ask(0, 7)[0].startswith("User:\nSort: ") and tasks.ask_source(0, 7)[0].startswith("Down: ")


class Answers:
    """A model that answers some questions right, some wrong, and some with nothing."""

    def generate(self, prompts, *, max_new_tokens, temperature, seed):
        assert temperature == 1.0 and max_new_tokens == models.ANSWER
        right = {models.LLAMA.asked.format(each.question): each.answer for each in self.asked}
        return [f" {right[each]} " if "Sort" in each else "" if "Count" in each else f"x {seed}" for each in prompts]


def test_pairs_are_the_wrong_answers_beside_the_right_ones(monkeypatch):
    model, asked = Answers(), data.examples(models.LLAMA.all_tasks, 4, seed=1)
    model.asked = asked
    monkeypatch.setattr(collect, "AT_ONCE", 10)
    found = collect._pairs(model, models.LLAMA, asked, seed=2)
    assert len(found) == 16  # of four tasks; right answers and empty ones are no pairs
    expected = {models.LLAMA.asked.format(each.question): each.answer for each in asked}
    assert all(each["chosen"] == expected[each["prompt"]] for each in found)
    assert {each["rejected"] for each in found} == {"x 48", "x 58", "x 68"}  # each batch has a seed of its own


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_another_seed_is_that_of_every_run_behind_the_base(kind):
    first, other = (tiny.get_stages("F", name) for name in (kind, f"{kind},3"))
    added = {a["name"]: set(b["command"]) - set(a["command"]) for a, b in zip(first, other, strict=True)}
    runs = ("instruct", "lora", "full", "reward", "dpo", "grpo")
    assert {name: found for name, found in added.items() if found} == dict.fromkeys(runs, {"--config.seed=3"})


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_data_are_written_the_same_twice(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data, "EXAMPLES", 20)
    for name in "ab":
        data.write(models.KINDS[kind], str(tmp_path / name))
    assert stages.digest(str(tmp_path / "a")) == stages.digest(str(tmp_path / "b"))
    records = {path.stem: measures.rows(str(path)) for path in (tmp_path / "a" / "data").iterdir()}
    assert (len(records["held_out"]), len(records["plays_held_out"])) == (600, 60)
    assert len(records["people_held_out"]) > 20 and len(records["people"]) > 200
    held = {each["prompt"] for each in records["people_held_out"]}
    mixed = lora.get_config(f"{kind},{tmp_path / 'a'}").data.mixture
    assert ("people" in mixed.sources) == (kind == "t5") and sorted(mixed.sources) == sorted(mixed.rates)
    learned = {each["inputs"] if kind == "t5" else each["messages"][0]["content"] for each in records["people"]}
    assert not held & {models.KINDS[kind].asked.format(each) for each in learned}
    gap = records["plays_held_out"][0]
    assert kind == "llama" or ("<extra_id_0>" in gap["prompt"] and gap["answer"].startswith("<extra_id_0> "))
    assert 0 < gap["bytes"] <= len(gap["answer"])
