"""`t5x_like plan` from the command line: a real train step and a real decode step for a TPU that is not there."""

import dataclasses
import json
import pathlib

import pytest

from t5x_like.__main__ import main
from tests.planner.programs import fabric

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT / 'configs/pretrain/test.py'}"


@pytest.fixture(scope="module")
def trained(compiler, tmp_path_factory):
    """The JSON of a train step with fsdp over 4 chips."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", CONFIG, "--topology=v5e:2x2", f"--json={path}"]) == 0
    return json.loads(path.read_text())


def test_json_holds_what_the_design_promises(trained):
    assert {"program", "topology", "chips", "mesh", "memory", "cycles", "collectives"} <= trained.keys()
    assert (trained["program"], trained["topology"], trained["chips"]) == ("train", "v5e:2x2", 4)
    assert trained["mesh"]["fsdp"] == 4
    assert {"arguments_bytes", "temporaries_bytes", "outputs_bytes"} <= trained["memory"].keys()
    assert all({"kind", "axes", "count", "bytes"} <= item.keys() for item in trained["collectives"])
    assert isinstance(trained["cycles"], int) and trained["cycles"] > 0


def test_a_train_step_gathers_parameters_and_reduces_gradients_over_fsdp(trained):
    kinds = {item["kind"] for item in trained["collectives"] if item["axes"] == ["fsdp"]}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "all-reduce"}
    assert trained["unknown_loops"] == []


def test_a_train_step_has_a_time_whose_parts_add_up(trained):
    estimate = trained["estimate"]
    assert estimate["step_seconds"] == pytest.approx(sum(estimate["parts"].values()))
    assert sum(item["cycles"] for item in trained["regions"]) == trained["cycles"]
    regions = {(item["region"], item["pass"]) for item in trained["regions"]}
    expected = {(name, which) for name in ("attention", "mlp", "head and loss") for which in ("forward", "backward")}
    assert expected | {("optimizer", "update")} <= regions
    exposed = sum(item["exposed_seconds"] for item in trained["collectives"])
    assert exposed == pytest.approx(estimate["exposed"]["exposed_ici"] + estimate["exposed"]["exposed_dcn"])
    assert 0 < exposed < sum(item["seconds"] for item in trained["collectives"])  # some run beside work
    assert 0 < estimate["mfu"] < estimate["mfu_full_attention"] < 1
    assert estimate["tokens_per_second"] == pytest.approx(estimate["tokens"] / estimate["step_seconds"])
    assert estimate["chip_hours"] == pytest.approx(4 * estimate["run_seconds"] / 3600)


def test_the_train_state_is_donated(trained):
    memory = trained["memory"]
    assert memory["aliased_bytes"] > 0.9 * memory["outputs_bytes"]


ROWS, LENGTH, LAYERS, KV_HEADS, HEAD = 16, 4096, 4, 4, 128
CACHE = 2 * ROWS * LENGTH * LAYERS * KV_HEADS * HEAD * 2 // 4  # keys and values in bf16, on each of 4 chips: 128 MiB


@pytest.fixture(scope="module", params=["4 kv heads, tensor=4", "4 kv heads, tensor=2, fsdp=2"])
def decoded(request, compiler, tmp_path_factory):
    """The JSON of a decode step whose cache is far larger than all else; one kv head a device, and two."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    tensor = int(request.param.partition("tensor=")[2][0])
    mesh = ["--config.mesh.preset=fsdp_tensor", f"--config.mesh.tensor={tensor}", f"--config.mesh.fsdp={4 // tensor}"]
    model = {"decoder.layers": LAYERS, "decoder.kv_heads": KV_HEADS, "decoder.head_size": HEAD, "max_length": LENGTH}
    sizes = [f"--rows={ROWS}", f"--length={LENGTH}", *(f"--config.model.{k}={v}" for k, v in model.items())]
    assert main(["plan", CONFIG, "--topology=v5e:2x2", "--program=decode", *mesh, *sizes, f"--json={path}"]) == 0
    return json.loads(path.read_text())


def test_a_decode_step_makes_no_copy_of_the_cache(decoded):
    assert decoded["memory"]["arguments_bytes"] > CACHE
    assert decoded["memory"]["aliased_bytes"] >= CACHE
    assert decoded["memory"]["temporaries_bytes"] < 0.25 * CACHE


def test_a_decode_step_reads_the_cache_about_once(decoded):
    """v5e reads 819 GB/s at 1.5 GHz. Copies of a layer's cache, and of the whole in another order, cost 15 reads."""
    assert 1.0 < decoded["cycles"] / (CACHE / (819 / 1.5)) < 8.0


def test_a_decode_step_gives_a_token_to_each_row(decoded):
    estimate = decoded["estimate"]
    assert estimate["tokens_per_second"] == pytest.approx(ROWS / estimate["step_seconds"])
    assert estimate["run_seconds"] is None
    assert {item["pass"] for item in decoded["regions"]} <= {"forward", ""}


READ_ROWS, READ_LENGTH = 8, 1024


@pytest.fixture(scope="module")
def read(compiler, tmp_path_factory):
    """(JSON, page) of the prefill of prompts for a model of 4 layers with 4 heads of 128, fsdp over 4 chips."""
    folder = tmp_path_factory.mktemp("plan")
    sizes = {"layers": LAYERS, "heads": KV_HEADS, "kv_heads": KV_HEADS, "head_size": HEAD}
    model = [f"--config.model.max_length={READ_LENGTH}", *(f"--config.model.decoder.{k}={v}" for k, v in sizes.items())]
    asked = ["--program=prefill", f"--rows={READ_ROWS}", f"--length={READ_LENGTH}", "--price=3USD"]
    files = [f"--json={folder / 'plan.json'}", f"--html={folder / 'plan.html'}"]
    assert main(["plan", CONFIG, "--topology=v5e:2x2", *asked, *model, *files]) == 0
    return json.loads((folder / "plan.json").read_text()), (folder / "plan.html").read_text()


def test_a_prefill_gives_the_cache_of_its_prompts(read):
    plan, _ = read
    cache = 2 * READ_ROWS * READ_LENGTH * LAYERS * KV_HEADS * HEAD * 2 // 4
    memory = plan["memory"]
    assert cache < memory["outputs_bytes"] < 1.1 * cache
    assert memory["arguments_bytes"] < 0.1 * cache and memory["aliased_bytes"] == 0
    assert cache <= memory["parts"]["outputs"] < 1.1 * cache
    assert not {"gradients", "saved activations", "cache"} & memory["parts"].keys()
    # Attention of whole prompts, not through the cache: the kernel of training, without its backward pass.
    assert [(kernel["count"], kernel["pass"]) for kernel in plan["kernels"]] == [(LAYERS, "forward")]
    assert {item["pass"] for item in plan["regions"]} <= {"forward", ""}


def test_a_prefill_computes_all_tokens_forward_and_the_logits_of_the_last_of_each(read):
    """Width 32, an MLP of 3 x 64, 259 tokens of vocabulary."""
    plan, page = read
    estimate, tokens = plan["estimate"], READ_ROWS * READ_LENGTH
    weights = 2 * LAYERS * (4 * 32 * KV_HEADS * HEAD + 3 * 32 * 64)
    attention = 4 * LAYERS * KV_HEADS * HEAD * READ_LENGTH
    head = READ_ROWS * 2 * 32 * 259
    assert estimate["model_flops_full_attention"] == tokens * (weights + attention) + head
    half = (READ_LENGTH + 1) / 2 / READ_LENGTH
    assert estimate["model_flops"] == pytest.approx(tokens * (weights + half * attention) + head)
    assert estimate["tokens"] == tokens and estimate["run_seconds"] is None
    assert estimate["cost_per_million_tokens"] == pytest.approx(4 * 3 / 3600 * 1e6 / estimate["tokens_per_second"])
    assert plan["facts"] == ["8 prompts, into a cache of 1024 tokens a text"] and plan["facts"][0] in page
    assert "a million tokens" in page and "<h1>prefill on v5e:2x2</h1>" in page


SOURCE = 2048


def test_a_prefill_of_an_encoder_decoder_runs_its_encoder_and_the_start_token(compiler, tmp_path, capsys):
    """Its cache has room for answers, and the keys and values of sources, of 4 heads of 32 in 3 layers."""
    path, rows, length, source = tmp_path / "plan.json", 8, 128, 64
    config = f"--config={ROOT / 'configs/pretrain/t5_tiny.py'}"
    rest = ["--program=prefill", f"--rows={rows}", f"--length={length}", f"--config.data.encoder_length={source}"]
    assert main(["plan", config, "--topology=v5e:2x2", *rest, f"--json={path}"]) == 0
    plan = json.loads(path.read_text())
    assert plan["memory"]["outputs_bytes"] >= 2 * rows * (length + source) * 3 * 4 * 32 * 2 // 4
    assert plan["estimate"]["tokens"] == rows * (source + 1)
    assert {"attention", "cross attention", "mlp"} <= {item["region"] for item in plan["regions"]}
    said = capsys.readouterr().out
    assert said.startswith("prefill step on v5e:2x2")
    assert "8 sources of 64 tokens, and a start token behind each, into a cache of 128 tokens a text\n" in said


def test_a_decode_step_of_an_encoder_decoder_copies_neither_cache(compiler, tmp_path):
    """Keys and values of the source are kept beside those of the answer; a device holds one of 4 heads."""
    path = tmp_path / "plan.json"
    sizes = {"layers": LAYERS, "heads": KV_HEADS, "kv_heads": KV_HEADS, "head_size": HEAD}
    model = ["--config.model.vocab_size=640", f"--config.model.max_length={LENGTH}"]
    model += [f"--config.model.{stack}.{k}={v}" for stack in ("encoder", "decoder") for k, v in sizes.items()]
    mesh = ["--config.mesh.preset=fsdp_tensor", "--config.mesh.tensor=4", "--config.mesh.fsdp=1"]
    config = f"--config={ROOT / 'configs/pretrain/t5_tiny.py'}"
    rest = ["--program=decode", f"--rows={ROWS}", f"--length={LENGTH}", f"--config.data.encoder_length={SOURCE}"]
    assert main(["plan", config, "--topology=v5e:2x2", *mesh, *model, *rest, f"--json={path}"]) == 0
    memory = json.loads(path.read_text())["memory"]
    cross = CACHE * SOURCE // LENGTH
    assert memory["arguments_bytes"] > CACHE + cross
    assert memory["aliased_bytes"] >= CACHE + cross
    assert memory["temporaries_bytes"] < 0.25 * CACHE


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--topology=v5p:3x3x3"], 2, "is no slice of v5p"),
        ([], 2, "--topology"),
        (["--topology=v5e:2x2", "--program=decode"], 2, "needs --rows and --length"),
        (["--topology=v5e:2x2", "--program=prefill", "--rows=4"], 2, "--program=prefill needs --rows and --length"),
        (["--topology=v5e:2x2", "--rows=4"], 2, "are for --program=prefill and decode"),
        (
            ["--topology=v5e:2x2", "--program=prefill", "--rows=6", "--length=64"],
            2,
            "--rows=6 is not divisible by the 4 data shards; use 4 or 8",
        ),
        (
            ["--topology=v5e:2x2", "--program=prefill", "--rows=4", "--length=129"],
            2,
            "--length=129 is longer than the texts of this model, config.model.max_length=128",
        ),
        (["--topology=v5e:2x2", "--program=fly"], 2, "invalid choice: 'fly'"),
        (["--topology=v5e:2x2", "--json=/no/such/folder/plan.json"], 1, "/no/such/folder is no folder"),
        (["--topology=v5e:2x2", "--config.data.batch_size=6"], 2, "is not divisible by the 4 data shards"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], 2, "but there are 4 devices"),
    ],
)
def test_bad_input_is_one_line(compiler, capsys, arguments, status, says):
    assert main(["plan", CONFIG, *arguments]) == status
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_table_labels_its_figures_as_estimates(trained):
    from t5x_like.planner import report
    from t5x_like.planner.compile import Compiled, Memory
    from t5x_like.planner.time import collectives, cost
    from t5x_like.planner.time.estimate import estimate
    from t5x_like.planner.time.schedule import Begun, Block, KernelCall, Op

    fields = [field.name for field in dataclasses.fields(collectives.Collective) if field.name != "devices"]
    items = [
        collectives.Collective(**{name: item[name] for name in fields} | {"axes": tuple(item["axes"])})
        for item in trained["collective_instructions"]
    ]
    ops = [Op("f", "jit(step)/jvp(layers)/mlp/mul", 12345678), Op("k", "", kernel=KernelCall("splash", (), {}))]
    ops += [Op(f"c{n}", item.source, begins=(Begun("x", item),), ends=("x",)) for n, item in enumerate(items)]
    kernels, loops = (cost.Kernel("splash", 1),), (cost.Loop("while.4", 8, 400),)
    walked = cost.Cost(12345678, kernels, tuple(items), {"sort": 1}, ("while.3",), loops, Block(1, tuple(ops)))
    text = "HloModule m\n\nENTRY %main (p: f32[25]) -> f32[25] {\n  ROOT %p = f32[25] parameter(0)\n}\n"
    plan = report.Plan(
        program="train",
        place=report.Place("v5e:2x2", 1, 4, trained["mesh"], 2**31),
        compiled=Compiled(text, Memory(2**30, 2**20, 2**30, 2**30), 1.0, 2.0),
        cost=walked,
        estimate=estimate(walked, fabric("v5e:2x2", trained["mesh"]), chips=4),
    )
    text = report.to_text(plan)
    assert text.startswith("train step on v5e:2x2: 4 chips, mesh fsdp=4\nEstimates of the TPU compiler")
    held = ("1.00 GiB", "fits into 2.00 GiB")
    for part in (*held, "1.235e+07 together", "splash x 1", "sort x 1", "while.3", "all-gather"):
        assert part in text
    assert "while.4 x 8, its limit, which data may not reach: 50 a turn" in text
    assert "jit(step)" not in text
    details = report.to_text(plan, details=True)
    assert "jit(step)" in details and "between  beside" in details


def test_the_table_says_cycles_and_flops_and_how_far_a_start_is_from_its_done(trained):
    """What one instruction begins and waits for is exposed whole, or runs beside its own work."""
    apart = [item for item in trained["collective_instructions"] if item["asynchronous"]]
    assert apart and all(item["instructions_between"] >= 0 for item in apart)
    hidden = [item["seconds"] - item["exposed_seconds"] for item in apart]
    assert all(0 <= gone <= item["computing_seconds_between"] + 1e-4 for gone, item in zip(hidden, apart, strict=True))
    assert max(item["computing_seconds_between"] for item in apart) > 0
    together = [item for item in trained["collective_instructions"] if not item["asynchronous"]]
    assert all(item["instructions_between"] is None for item in together)
    sums = {(total["kind"], tuple(total["axes"])): 0 for total in trained["collectives"]}
    for item in trained["collective_instructions"]:
        sums[item["kind"], tuple(item["axes"])] += item["count"] * item["bytes_each"]
    assert sums == {(total["kind"], tuple(total["axes"])): total["bytes"] for total in trained["collectives"]}
