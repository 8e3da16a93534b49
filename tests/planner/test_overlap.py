"""What of collectives is exposed, on programs whose collectives, copies and work take known times."""

import pytest

from t5x_like.planner.time.cost import cost
from t5x_like.planner.time.network import Trip
from t5x_like.planner.time.overlap import play
from t5x_like.planner.time.schedule import Copy
from tests.planner.programs import computation, cycles, module
from tests.planner.test_cost import A, P, loop_body, loop_condition, run_loop

MESH = {"data": 2, "fsdp": 2}
GROUPS = "replica_groups={{0,1},{2,3}}"


def played(main, computations="", *, seconds=100.0):
    """[(kind, seconds, exposed)]: a cycle is a second, a collective takes `seconds`, a copy a second for 1024 bytes."""
    schedule = cost(module("\n".join([P, *main]), computations), MESH).schedule

    def transfer(what):
        if isinstance(what, Copy):
            return Trip("hbm", what.bytes / 1024, ("hbm",))
        return Trip(what.network, seconds, tuple((lane, way) for lane in what.axes for way in what.shifts or (1, -1)))

    flights = play(schedule, work=lambda op: float(op.cycles), transfer=transfer)
    kinds = [flight.collective.kind if flight.collective else flight.network for flight in flights]
    return [(kind, flight.seconds, flight.exposed) for kind, flight in zip(kinds, flights, strict=True)]


WORK = "  %{} = f32[8,128] fusion(%p), kind=kLoop, calls=%f, " + "{}"
F = computation("f", A, "  ROOT %m = f32[8,128] multiply(%a, %a)")
START = f"  %s = (f32[8,128], f32[16,128]) all-gather-start(%p), {GROUPS}, dimensions={{0}}"
DONE = "  %d = f32[16,128] all-gather-done(%s)"


def test_a_collective_that_nothing_runs_beside_is_exposed_whole():
    main = [WORK.format("w", cycles(500)), f"  %r = f32[8,128] all-reduce(%p), {GROUPS}, to_apply=%add"]
    assert played(main, F) == [("all-reduce", 100, 100)]


@pytest.mark.parametrize(("work", "exposed"), [(30, 70), (100, 0), (500, 0)])
def test_what_is_computed_between_start_and_done_hides_as_much_of_it(work, exposed):
    main = [WORK.format("before", cycles(900)), START, WORK.format("beside", cycles(work)), DONE]
    assert played([*main, WORK.format("after", cycles(900))], F) == [("all-gather", 100, exposed)]


def flown(main, computations=""):
    """[(instructions between start and done, seconds of computing between them)] of collectives of 100 seconds."""
    schedule = cost(module("\n".join([P, *main]), computations), MESH).schedule
    flights = play(schedule, work=lambda op: float(op.cycles), transfer=lambda what: Trip("ici", 100.0, (what,)))
    return [(flight.between, flight.beside) for flight in flights]


def test_start_and_done_are_as_far_apart_as_instructions_stand_between_them():
    """Waiting is no computing: of two gathers the one that ends later has waited for the other meanwhile."""
    second = START.replace("%s ", "%s2 "), DONE.replace("%d ", "%d2 ").replace("%s)", "%s2)")
    work = [WORK.format("one", cycles(20)), WORK.format("two", cycles(10))]
    assert flown([WORK.format("w", cycles(9)), START, *work, DONE], F) == [(2, 30)]
    assert flown([START, second[0], *work, DONE, second[1]], F) == [(3, 30), (3, 30)]
    loop = loop_body("body", f"  %y = f32[8,128] copy(%x), {cycles(15)}") + loop_condition("c.l", 4)
    assert flown([START, *run_loop("l", "body", "p"), WORK.format("w", cycles(5)), DONE], F + loop) == [(2, 65)]


def test_what_one_instruction_begins_and_waits_for_has_no_distance():
    fused = computation(
        "matmul", A, f"  %g = f32[16,128] all-gather(%a), {GROUPS}", "  ROOT %x = f32[8,128] add(%a, %a)"
    )
    main = [f"  %f1 = f32[8,128] fusion(%p), kind=kOutput, calls=%matmul, {cycles(60)}"]
    assert flown(main, fused) == [(None, 60)]
    assert flown([f"  %r = f32[8,128] all-reduce(%p), {GROUPS}, to_apply=%add"]) == [(None, 0)]


def test_collectives_on_the_same_links_take_their_turns():
    """The second waits for the first: 200 in all, of which 120 are computed beside."""
    second = START.replace("%s ", "%s2 "), DONE.replace("%d ", "%d2 ").replace("%s)", "%s2)")
    main = [START, second[0], WORK.format("beside", cycles(120)), DONE, second[1]]
    assert played(main, F) == [("all-gather", 100, 0), ("all-gather", 100, 80)]


def test_collectives_on_other_links_and_the_two_ways_of_a_ring_run_side_by_side():
    """A product of which both halves go around a ring, one each way, beside a collective over another axis."""
    permute = (
        "  %{0}s = (f32[8,128], f32[8,128]) collective-permute-start(%p), source_target_pairs={{{{0,{1}}},{{2,{2}}}}}"
    )
    main = [
        permute.format("a", 1, 3),
        START.replace(GROUPS, "replica_groups={{0,2},{1,3}}"),
        WORK.format("beside", cycles(100)),
        "  %ad = f32[8,128] collective-permute-done(%as)",
        DONE,
    ]
    assert played(main, F) == [("collective-permute", 100, 0), ("all-gather", 100, 0)]


def test_a_chain_is_in_flight_from_its_first_fusion_to_its_last():
    """The fusion that advances it and the one between, which does not: both hide it."""
    gather = f'= f32[16,128] all-gather(%a), channel_id=11, {GROUPS}, frontend_attributes={{chain_id="0"}}'
    fused = "".join(
        computation(name, A, f"  %g.{name} {gather}", "  ROOT %x = f32[8,128] add(%a, %a)")
        for name in ("begin", "advance", "end")
    )
    body = loop_body(
        "body",
        "  %b = f32[8,128] fusion(%x), kind=kCustom, calls=%begin",
        f"  %w = f32[8,128] fusion(%b), kind=kOutput, calls=%advance, {cycles(40)}",
        f"  %v = f32[8,128] fusion(%w), kind=kLoop, calls=%f, {cycles(25)}",
        "  %y = f32[8,128] fusion(%v), kind=kCustom, calls=%end",
    )
    computations = F + fused + body + loop_condition("c.l", 6)
    assert played(run_loop("l", "body", "p"), computations) == [("all-gather", 600, 6 * (100 - 40 - 25))]


def test_a_collective_within_a_fusion_runs_beside_that_fusions_own_work():
    fused = computation(
        "matmul", A, f"  %g = f32[16,128] all-gather(%a), {GROUPS}", "  ROOT %x = f32[8,128] add(%a, %a)"
    )
    main = [f"  %f1 = f32[8,128] fusion(%p), kind=kOutput, calls=%matmul, {cycles(60)}"]
    assert played(main, fused) == [("all-gather", 100, 40)]


def test_a_wrapped_collective_is_waited_for_behind_its_updates():
    wrapped = computation("wrapped", A, f"  ROOT %s = f32[4,128] reduce-scatter(%a), {GROUPS}, to_apply=%add")
    main = [
        "  %s = ((f32[8,128]), f32[4,128], s32[]) async-start(%p), calls=%wrapped",
        WORK.format("one", cycles(10)),
        "  %u = ((f32[8,128]), f32[4,128], s32[]) async-update(%s)",
        WORK.format("two", cycles(10)),
        "  %d = f32[4,128] async-done(%u)",
    ]
    assert played(main, F + wrapped) == [("reduce-scatter", 100, 80)]


def test_a_loop_beside_which_a_collective_runs_hides_all_of_its_turns():
    body = loop_body("body", f"  %y = f32[8,128] copy(%x), {cycles(15)}")
    main = [START, *run_loop("l", "body", "p"), DONE]
    assert played(main, body + loop_condition("c.l", 4)) == [("all-gather", 100, 40)]


def test_copies_between_memories_do_not_wait_for_collectives():
    copy = "  %c = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]) copy-start(%p)"
    main = [START, copy, WORK.format("w", cycles(1)), "  %e = f32[8,128]{1,0:S(1)} copy-done(%c)", DONE]
    assert played(main, F) == [("hbm", 4, 3), ("all-gather", 100, 96)]


def test_an_exchange_between_slices_is_in_flight_beside_collectives_within_them():
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    kind = '_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"'
    attributes = f"frontend_attributes={{{kind},{handler}}}"
    main = [
        f"  %rv = (f32[8,128], u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, {attributes}",
        f"  %sd = (f32[8,128], u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, {attributes}",
        f"  %r = f32[8,128] all-reduce(%p), {GROUPS}, to_apply=%add",
        WORK.format("w", cycles(30)),
        "  %x = token[] send-done(%sd), channel_id=2, is_host_transfer=true",
        "  %y = (f32[8,128], token[]) recv-done(%rv), channel_id=1, is_host_transfer=true",
    ]
    schedule = cost(module("\n".join([P, *main]), F), {"slice": 2, "data": 1, "fsdp": 2}).schedule

    def transfer(what):
        return Trip(what.network, 100.0, (what.network,))

    flights = play(schedule, work=lambda op: float(op.cycles), transfer=transfer)
    found = {(flight.network, flight.exposed) for flight in flights}
    assert found == {("ici", 100.0), ("dcn", 0.0)}
