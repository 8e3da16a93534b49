"""What `t5x_like plan` says and writes besides its table: slices, pages, prices, progress, refusals, company."""

import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import time
import xml.dom.minidom

import pytest

from t5x_like.__main__ import main
from t5x_like.commands import plan_file
from t5x_like.core.errors import UserError
from t5x_like.core.terminal import Waiting
from t5x_like.planner.compile import DoesNotFit
from t5x_like.planner.memory.peak import Large

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT / 'configs/pretrain/test.py'}"
TWO_SLICES = (CONFIG, "--topology=v5litepod-4", "--slices=2")


@pytest.fixture(scope="module")
def planned(compiler, tmp_path_factory):
    """(JSON, page, folder of compiled programs) of a train step on two slices."""
    folder = tmp_path_factory.mktemp("plan")
    files = [f"--json={folder / 'plan.json'}", f"--html={folder / 'plan.html'}", f"--cache={folder / 'cache'}"]
    assert main(["plan", *TWO_SLICES, *files, "--price=2.5 usd"]) == 0
    return json.loads((folder / "plan.json").read_text()), (folder / "plan.html").read_text(), folder / "cache"


def test_two_slices_are_planned_with_what_crosses_between_them(planned):
    plan, _, _ = planned
    assert (plan["topology"], plan["slices"], plan["chips"]) == ("v5e:2x2", 2, 8)
    assert (plan["mesh"]["slice"], plan["mesh"]["fsdp"]) == (2, 4)
    between = [item for item in plan["collectives"] if item["network"] == "dcn"]
    assert between and all(item["axes"] == ["slice"] and item["group_size"] == 2 for item in between)
    # Gradients at least: each device those of its own part of the parameters, in float32 or bf16.
    assert sum(item["bytes"] for item in between) >= plan["memory"]["parts"]["parameters"] // 2


def test_the_json_says_what_memory_is_made_of(planned):
    memory = planned[0]["memory"]
    assert {"parameters", "optimizer state", "batch"} <= memory["parts"].keys()
    assert sum(memory["parts"].values()) == memory["live_peak_bytes"]
    assert memory["parts"]["optimizer state"] >= 2 * memory["parts"]["parameters"] - 4096
    assert max(moment["bytes"] for moment in memory["timeline"]) == memory["live_peak_bytes"]
    assert [moment["at"] for moment in memory["timeline"]] == sorted(moment["at"] for moment in memory["timeline"])
    assert all({"bytes", "shape", "part", "operation", "region", "pass"} <= item.keys() for item in memory["largest"])
    # The compiler's own peak has the vector memory in it, where most of so small a program lies.
    assert memory["total_bytes"] == memory["live_peak_bytes"] and planned[0]["fits"]
    assert memory["total_bytes"] < memory["peak_bytes"] <= memory["total_bytes"] + 1.01 * memory["vector_bytes"] + 4096


def test_the_page_and_the_price_are_there(planned):
    plan, page, _ = planned
    for drawing in page.split("<svg")[1:]:
        xml.dom.minidom.parseString("<svg" + drawing.partition("</svg>")[0] + "</svg>")
    assert page.count("<svg") >= 3 and "2 x v5e:2x2" in page
    estimate = plan["estimate"]
    assert estimate["currency"] == "USD" and estimate["cost"] == pytest.approx(2.5 * estimate["chip_hours"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology=v5e:2x2", "--price=4.20"], "--price=4.20 has no currency; write --price=4.20USD"),
        (
            ["--topology=v5e:2x2", "--price=cheap"],
            "--price=cheap should be what a chip costs an hour, with its currency",
        ),
        (["--topology=v5e:2x2", f"--price={'9' * 400}USD"], "should be what a chip costs an hour"),
        (["--topology=v5e:2x2", "--price=0USD"], "--price=0USD should be what a chip costs an hour"),
        (["--topology=v5e:2x2", "--slices=0"], "--slices=0 should be a number of slices, at least 1"),
        (["--topology=v5e:2x2", "--slices=2", "--config.mesh.slice=3"], "config.mesh"),
        (["--topology=v5e:2x2", "--slices=2", "--config.mesh.slice=1"], "set config.mesh.slice=2"),
        (["--topology=v5e:2x4", "--config.mesh.tensor=3"], "does not divide the 8 devices"),
        (["--topology=v5p-512"], "has several shapes; write v5p:4x4x16 or v5p:4x8x8"),
        (["--topology=h100-8"], "'h100-8' is unknown"),
        (["--topology=v5e:2x2", "--html=/no/such/folder/plan.html"], "/no/such/folder is no folder"),
        (
            ["--topology=v5e:2x2", "--cache=gs://bucket/plans"],
            "--cache=gs://bucket/plans: compiled programs are kept on",
        ),
        (["--topology=v5e:2x2", "--json=/tmp"], "--json=/tmp is a folder; name a file in it"),
        (
            ["--topology=v5e:2x2", "--json=/tmp/no_plan", "--html=/tmp/../tmp/no_plan"],
            "both write /tmp/no_plan; give two paths",
        ),
        (["--topology=v5e:2x2", "--search", "--html=/tmp/x.html"], "leave out --html"),
        (["--topology=v5e:2x2", "--search", "--price=4USD"], "leave out --price"),
        (["--topology=v5e:2x2", "--search", "--default_options"], "leave out --default_options"),
        (["--topology=v5e:2x2", "--search", "--slices=0"], "--slices=0 should be a number of slices, at least 1"),
    ],
)
def test_bad_input_is_one_line(compiler, capsys, arguments, says):
    assert main(["plan", CONFIG, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("planned with config.mesh.slice")]
    assert len(lines) == 1 and says in lines[0]


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(UserError, match="plan.json cannot be written"):
        plan_file.write_json(tmp_path / "plan.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_check_is_of_as_many_slices_as_the_config_says(capsys):
    arguments = ["--check", CONFIG, "--topology=v5e:2x2", "--config.mesh.slice=2"]
    assert main(["plan", *arguments]) == 0, capsys.readouterr()
    assert "mesh slice=2 fsdp=4" in capsys.readouterr().out
    assert main(["plan", *arguments, "--slices=1"]) == 2
    assert "the devices are 1 slice\n" in "".join(capsys.readouterr())


def test_without_the_compiler_the_line_names_the_extra(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    )
    assert main(["plan", CONFIG, "--topology=v5e:2x2"]) == 1
    error = capsys.readouterr().err
    assert "pip install 't5x_like[tpu]'" in error and error.count("\n") == 1


def test_a_config_that_does_not_fit_ends_with_its_largest_buffers_and_leaves_the_plan(compiler, tmp_path, capsys):
    """Four million tokens a device."""
    path = tmp_path / "plan.json"
    sizes = ["--config.data.batch_size=4096", "--config.data.length=4096", "--config.model.max_length=4096"]
    sizes += ["--config.model.width=256", "--config.model.remat=none"]
    arguments = [*sizes, "--topology=v5e:2x2", f"--json={path}", "--cache=off"]
    assert main(["plan", CONFIG, *arguments]) == 1
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "does not fit" in line]
    plan = json.loads(path.read_text())
    assert plan["fits"] is False and plan["problem"] in line
    largest = plan["memory"]["largest"][0]
    assert f"the largest being {largest['shape']}" in line and largest["part"] in line
    assert plan["memory"]["total_bytes"] > plan["hbm_bytes"]
    assert "does not fit into 15.8 GiB, by" in said.out and largest["shape"] in said.out


def child(folder: pathlib.Path, name: str, cache: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "t5x_like", "plan", *TWO_SLICES, f"--cache={cache}", f"--json={folder / name}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


@pytest.mark.parametrize("cache", ["full", pytest.param("empty", marks=pytest.mark.slow)])
def test_two_plans_at_once_say_the_same(planned, tmp_path, cache):
    """Both write one file, and with an empty cache both compile and keep the same program."""
    where = planned[2] if cache == "full" else tmp_path / "cache"
    both = [child(tmp_path, "plan.json", where) for _ in range(2)]
    for process in both:
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert "train step on 2 x v5e:2x2" in output
        assert error.splitlines()[1:] == [
            "lowering the train step",
            *(["compiling the train step"] * (cache != "full")),
        ]
    assert json.loads((tmp_path / "plan.json").read_text())["memory"] == planned[0]["memory"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["plan.json"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_counts_the_seconds():
    out = Terminal()
    with Waiting("compiling", stream=out, seconds=0.02):
        time.sleep(0.2)
    text = out.getvalue()
    assert text.count("compiling: ") >= 2 and text.count("\n") == 1
    assert all(part.startswith("\x1b[2Kcompiling") for part in text.strip().split("\r")[1:])


def test_of_a_refusal_without_a_text_the_files_say_what_the_compiler_said(compiler, monkeypatch, tmp_path, capsys):
    """In place of those of an earlier plan, which would be read as if they were of this one."""
    large = Large(2**40, "bf16[8,128]", "", "jit(step)/dot", "mlp", "forward")

    def refuse(*arguments, **options):
        raise DoesNotFit("the program does not fit: much", listed=[large])

    monkeypatch.setattr("t5x_like.planner.compile.compile_program", refuse)
    files = {"json": tmp_path / "plan.json", "html": tmp_path / "plan.html"}
    for path in files.values():
        path.write_text("of an earlier plan")
    asked = [f"--{name}={path}" for name, path in files.items()]
    assert main(["plan", CONFIG, "--topology=v5e:2x2", *asked]) == 1
    plan, page = json.loads(files["json"].read_text()), files["html"].read_text()
    assert (plan["fits"], plan["problem"], plan["mesh"]["fsdp"]) == (False, "the program does not fit: much", 4)
    assert plan["largest"][0]["shape"] == "bf16[8,128]"
    said = capsys.readouterr()
    assert all("bf16[8,128]" in text for text in (page, said.out))
    assert "v5e:2x2 is too small: the program does not fit: much" in said.err
