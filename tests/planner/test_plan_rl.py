"""`t5x_like plan` of a run of reinforcement learning: all programs of an iteration, for a TPU that is not there."""

import json
import pathlib

import pytest

from configs.rl import test as tested
from t5x_like.__main__ import main
from t5x_like.parallel import mesh as meshes
from t5x_like.planner import page
from t5x_like.planner.compile import compile_program
from t5x_like.planner.time.cost import cost
from t5x_like.planner.topology import topology
from t5x_like.runs import program as programs
from t5x_like.runs import rl_program, train
from t5x_like.runs.functions import named_functions
from tests.planner.programs import fabric

ROOT = pathlib.Path(__file__).resolve().parents[2]
ANSWERS, ROWS, NEW = 16, 8, 6
CONFIG = """
from t5x_like.configs import common
from t5x_like.configs.rl import test


def get_config():
    config = test.get_config()
    role = {"rules": "", "dtype": "bfloat16"}
    config.roles.reference = role | {"source": "no/such/start"}
    config.roles.reward = role | {"source": "no/such/judge"}
    config.rl.rewards.judge = common.reward("model")
    config.objective.grpo.update({"kl_coefficient": 0.1, "reference": "role"})
    return config
"""
TIMES = {"rollout": 1, "reward": 2, "score": 2, "reference": 2, "update": 2}


@pytest.fixture(scope="module")
def planned(compiler, tmp_path_factory):
    """(the JSON of a plan with a reference and a reward model, what the command printed)."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        arguments = [f"--config={folder / 'config.py'}", "--topology=v5e:2x2", f"--json={folder / 'plan.json'}"]
        assert main(["plan", *arguments]) == 0
    return json.loads((folder / "plan.json").read_text()), "\n".join(said)


def test_every_program_of_an_iteration_is_planned_as_often_as_it_runs(planned):
    plan, _ = planned
    assert (plan["program"], plan["chips"], plan["mesh"]["fsdp"]) == ("rl", 4, 4)
    assert {part["program"]: part["times"] for part in plan["programs"]} == TIMES
    for part in plan["programs"]:
        assert part["fits"] and part["cycles"] > 0 and part["memory"]["total_bytes"] > 0, part["program"]


def test_the_iteration_is_the_sum_of_its_programs(planned):
    plan, _ = planned
    assert plan["iteration"]["cycles"] == sum(part["times"] * part["cycles"] for part in plan["programs"])
    exchanged = sum(part["times"] * item["bytes"] for part in plan["programs"] for item in part["collectives"])
    assert exchanged == sum(item["bytes"] for item in plan["iteration"]["collectives"]) > 0
    most = max(part["memory"]["total_bytes"] + part["beside_bytes"] for part in plan["programs"])
    assert plan["iteration"]["peak_bytes"] == most < plan["hbm_bytes"]


def test_an_iteration_takes_as_long_as_its_programs(planned):
    plan, _ = planned
    seconds = {part["program"]: part["times"] * part["estimate"]["step_seconds"] for part in plan["programs"]}
    assert plan["estimate"]["parts"] == pytest.approx(seconds)
    assert plan["estimate"]["iteration_seconds"] == pytest.approx(sum(seconds.values()))
    assert plan["estimate"]["bound_by"].partition(":")[0] == max(seconds, key=lambda name: seconds[name])
    assert plan["estimate"]["run_seconds"] > plan["estimate"]["iteration_seconds"]


def test_a_rollout_counts_its_loop_for_the_most_tokens_that_an_answer_has(planned):
    plan, said = planned
    rollout = plan["programs"][0]
    assert [loop["turns"] for loop in rollout["limited_loops"]] == [NEW]
    assert 0 < rollout["limited_loops"][0]["cycles"] < rollout["cycles"]
    assert all(part["unknown_loops"] == [] for part in plan["programs"])
    assert f"x {NEW}, its limit, which data may not reach" in said


def gathered_for_every_token(collectives):
    return sum(item.count * item.bytes_each for item in collectives if item.kind == "all-gather" and item.count >= NEW)


@pytest.mark.parametrize("weights", ["gathered", "sharded"])
def test_a_rollout_gathers_the_policy_once_unless_it_is_told_to_leave_it_sharded(compiler, weights):
    config = tested.get_config()
    config.rl.weights = weights
    experiment = train.built(rl_program.RlExperiment, named_functions(config.to_dict())[0])
    mesh = meshes.make(experiment.mesh, topology("v5e:2x2").devices)
    program = programs.step_program(experiment, mesh)
    rollout = rl_program.stages(experiment, program)[0]
    found = cost(compile_program(rollout.step, rollout.arguments, mesh=mesh).text, dict(mesh.shape))
    policy = 2 * program.model.parameter_count()  # bytes of bfloat16
    again = gathered_for_every_token(found.collectives)
    assert again == 0 if weights == "gathered" else again > 0.9 * NEW * policy


def test_what_a_program_does_not_read_is_held_beside_it(planned):
    """Beside an update: both roles. Beside a rollout also two moments of each parameter, in float32. Beside the
    reference in bfloat16, which has half the bytes of the policy, the policy in its place."""
    beside = {part["program"]: part["beside_bytes"] for part in planned[0]["programs"]}
    moments = beside["rollout"] - beside["update"]
    assert moments > beside["update"] > 0
    assert beside["score"] == beside["rollout"]
    assert beside["reference"] - beside["rollout"] == pytest.approx(moments / 4, rel=0.05)
    assert beside["reward"] == pytest.approx(beside["reference"], rel=0.01)


def test_roles_that_are_not_there_are_said_to_be_assumed(planned):
    plan, said = planned
    for name, source in (("reference", "no/such/start"), ("reward", "no/such/judge")):
        assert f"role {name}: {source} is not there, planned like config.model" in plan["facts"]
        assert f"config.roles.{name}.source={source} is not there" in said


def test_the_table_has_a_section_for_each_program_and_one_for_the_iteration(planned):
    _, said = planned
    sections = [line for line in said.splitlines() if line.startswith("== ")]
    assert [line.split()[1].rstrip(":") for line in sections] == [*TIMES, "iteration"]
    assert said.count("fits into 15.8 GiB") == len(TIMES) + 1


def test_an_iteration_with_a_program_that_does_not_fit_shows_the_others():
    from t5x_like.planner import iteration
    from t5x_like.planner.compile import Compiled, Memory
    from t5x_like.planner.report import Place
    from t5x_like.planner.time.cost import Cost
    from t5x_like.planner.time.estimate import estimate

    text = "HloModule m\n\nENTRY %main (p: f32[25]) -> f32[25] {\n  ROOT %p = f32[25] parameter(0)\n}\n"
    walked = Cost(50, (), (), {}, (), ())
    time = estimate(walked, fabric("v5e:2x2", {"fsdp": 4}), chips=4)
    found = Compiled(text, Memory(100, 20, 5, 0), 1.0, 1.0), walked, time
    parts = [
        iteration.Part("rollout", "draws", 1, 0, None, "the program does not fit"),
        iteration.Part("score", "reads", 2, 0, found, ""),
        iteration.Part("update", "trains", 2, 900, found, ""),
    ]
    plan = iteration.Iteration("rl", Place("v5e:2x2", 1, 4, {"fsdp": 4}, 1000), ["an iteration"], parts)
    assert [line.partition(":")[0] for line in plan.problems] == ["rollout", "update"]
    assert (plan.cycles, plan.largest) == (200, parts[2])
    text = iteration.to_text(plan)
    assert "the program does not fit" in text and "does not fit into 1000 B of a device" in text
    content = iteration.to_json(plan)["iteration"]
    assert (content["complete"], content["fits"], content["peak_bytes"]) == (False, False, 1025)
    assert "by 25 B" in iteration.to_json(plan)["programs"][2]["problem"]


def test_a_program_that_the_compiler_takes_fits_though_our_measure_is_a_little_above_its_limit():
    """1025 bytes by our reading and a limit of 1000, which the compiler's own measure kept."""
    from t5x_like.planner import iteration
    from t5x_like.planner.compile import Compiled, Memory
    from t5x_like.planner.report import Place
    from t5x_like.planner.time.cost import Cost
    from t5x_like.planner.time.estimate import estimate

    walked = Cost(50, (), (), {}, (), ())
    time = estimate(walked, fabric("v5e:2x2", {"fsdp": 4}), chips=4)
    found = Compiled("", Memory(1000, 20, 5, 0), 1.0, 1.0), walked, time
    parts = [iteration.Part("score", "reads", 2, 0, found, "")]
    plan = iteration.Iteration("rl", Place("v5e:2x2", 1, 4, {"fsdp": 4}, 1000), [], parts)
    content, text = iteration.to_json(plan), iteration.to_text(plan)
    assert content["programs"][0]["fits"] and content["iteration"]["fits"] and "estimate" in content
    assert "does not fit" not in text and "fits into 1000 B, 0 B are free" in text
    assert "fits, 0 B are free" in page.page(content)


def test_an_iteration_on_several_slices_says_that_they_have_no_rings():
    from t5x_like.planner import iteration
    from t5x_like.planner.report import Place

    parts = [iteration.Part("rollout", "draws", 1, 0, None, "the program does not fit")]
    place = Place("v5p:4x4x4", 2, 128, {"slice": 2, "fsdp": 64}, 1000)
    assert "no rings" in iteration.to_text(iteration.Iteration("rl", place, [], parts))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config=pretrain/test", "--program=rl"], "this one has no section rl"),
        (["--config=rl/test", "--rows=4"], "are for --program=prefill and decode"),
        (["--config=rl/test", "--config.rl.rows=2"], "config.rl.rows=2 decodes 2 answers at once"),
        (["--config=rl/test", "--config.rl.weights=whole"], "config.rl.weights='whole' is unknown"),
    ],
)
def test_bad_input_is_one_line(compiler, capsys, arguments, says):
    assert main(["plan", "--topology=v5e:2x2", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
