"""The time of a step, with reasons: what is computed, what kernels take, and what of the networks is exposed.

    step = computing + kernels (kernels.py) + waiting: for each network, its WAITED share of what of its collectives and
        copies the schedule leaves exposed (overlap.py)
    computing, of an operation with products: see `computing_seconds`; of any other = its cycles / clock: most of these
    read memory, at 72 to 81% of its speed by the compiler's estimate

An estimate throughout. From it follow MFU in both usual conventions, tokens a second, and time, chip-hours and cost of
a run. Not here: text and JSON of it (report.py).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from t5x_like.core.accelerators import Generation
from t5x_like.planner.time import kernels, network, overlap, regions
from t5x_like.planner.time.cost import Cost
from t5x_like.planner.time.network import Fabric
from t5x_like.planner.time.overlap import Flight
from t5x_like.planner.time.schedule import Op

# Fitted to published runs (`python -m tools.calibrate --fit`, docs/planner.md):
# Of what the compiler estimates for a product above the time that its FLOPs need at the peak, the share that counts: it
# estimates products, fused ones most, above what those runs need.
CYCLE_SHARE = 0.35
# Share of the peak of the matrix units that a product reaches of which the compiler expects all of it.
MATRIX_SHARE = 0.99
# Share of what the schedule leaves exposed within a slice (ICI, copies between HBM and VMEM) that a step waits for; why
# so little, is not known (docs/planner.md). The rows it was fitted to say nothing of DCN and of the host: a step waits
# for all of these.
EXPOSED_SHARE = 0.17

OPERATIONS = 20  # so many of the longest are listed

# What the parts of a step are called where people read of them.
PARTS = {
    "compute": "computing",
    "kernels": "kernels",
    "exposed_ici": "waiting for ICI",
    "exposed_dcn": "waiting for DCN",
    "exposed_hbm": "waiting for copies",
    "exposed_host": "waiting for the host",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program is for, over all devices. tokens: of one execution; model_flops: those that its mathematics needs
    (models/flops.py), full_flops: the same with causal attention counted as if all keys were seen, both None where
    nobody counts them; executions: of a whole run, None where there is none."""

    tokens: int
    model_flops: float | None
    full_flops: float | None
    executions: int | None = None


@dataclasses.dataclass(frozen=True)
class Price:
    """Of a chip for an hour."""

    amount: float
    currency: str


@dataclasses.dataclass(frozen=True)
class RegionTime:
    """Of a region in a pass on one device. seconds: of what is computed, `in_kernels` among them; exposed: of its
    collectives and copies, by the schedule, of which a step waits for `waiting`; flops: of products and kernels."""

    cycles: int
    seconds: float
    in_kernels: float
    exposed: float
    waiting: float
    flops: int


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """All executions of a kernel on one device. flops and seconds are None where it is not known."""

    name: str
    region: str
    which: str  # the pass
    count: int
    flops: int | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class OpTime:
    """All executions of an instruction on one device."""

    op: Op
    count: int
    seconds: float
    flops: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one execution.

    parts: {name: seconds}, which add up to step_seconds; exposed: of each part that is waiting, what the schedule
    leaves exposed, of which the part is a share; compiler_seconds: of computing, by the compiler's cycles over the
    clock; incomplete: what has no time and counts as none; constants: the fitted ones; regions: {(region, pass): its
    time}; hardware_flops: of all chips, with what is computed again; operations: those that compute longest, so many.
    """

    step_seconds: float
    parts: Mapping[str, float]
    exposed: Mapping[str, float]
    compiler_seconds: float
    incomplete: tuple[str, ...]
    constants: Mapping[str, float]
    bound_by: str
    regions: Mapping[tuple[str, str], RegionTime]
    hardware_flops: float
    kernels: tuple[KernelTime, ...]
    flights: tuple[Flight, ...]
    operations: tuple[OpTime, ...]
    chips: int
    devices: int
    peak: float  # FLOP/s of all of them
    work: Work | None
    price: Price | None = None

    @property
    def exposed_step_seconds(self) -> float:
        """Of a step that waits for all that the schedule leaves exposed."""
        return self.step_seconds + sum(seconds - self.parts[name] for name, seconds in self.exposed.items())

    @property
    def mfu(self) -> float | None:
        return self._share_of_peak(None if self.work is None else self.work.model_flops)

    @property
    def mfu_full_attention(self) -> float | None:
        return self._share_of_peak(None if self.work is None else self.work.full_flops)

    @property
    def hardware_utilisation(self) -> float | None:
        """HFU: with what is computed again, and whole blocks of attention."""
        return self._share_of_peak(self.hardware_flops)

    def _share_of_peak(self, flops: float | None) -> float | None:
        return None if flops is None or not self.step_seconds else flops / self.step_seconds / self.peak

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.work is None or not self.step_seconds else self.work.tokens / self.step_seconds

    @property
    def run_seconds(self) -> float | None:
        steps = None if self.work is None else self.work.executions
        return None if steps is None else steps * self.step_seconds

    @property
    def chip_hours(self) -> float | None:
        return None if self.run_seconds is None else self.run_seconds * self.chips / 3600

    @property
    def cost(self) -> float | None:
        return None if self.chip_hours is None or self.price is None else self.chip_hours * self.price.amount

    @property
    def cost_per_million_tokens(self) -> float | None:
        """What a million tokens cost, which also a program has that is of no run."""
        if self.price is None or not self.tokens_per_second:
            return None
        return 1e6 / self.tokens_per_second / 3600 * self.chips * self.price.amount


@dataclasses.dataclass(frozen=True)
class IterationTime:
    """Of programs that run one after the other. programs: {name: (executions an iteration, its estimate)}."""

    programs: Mapping[str, tuple[int, Estimate]]
    executions: int | None = None

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of an iteration in each program."""
        return {name: times * each.step_seconds for name, (times, each) in self.programs.items()}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        """The program that takes longest, and what bounds it."""
        name = max(self.parts, key=lambda part: self.parts[part])
        return f"{name}: {self.programs[name][1].bound_by}"

    @property
    def run_seconds(self) -> float | None:
        return None if self.executions is None else self.executions * self.seconds

    @property
    def chip_hours(self) -> float | None:
        chips = next(iter(self.programs.values()))[1].chips
        return None if self.run_seconds is None else self.run_seconds * chips / 3600

    @property
    def price(self) -> Price | None:
        return next(iter(self.programs.values()))[1].price

    @property
    def cost(self) -> float | None:
        return None if self.chip_hours is None or self.price is None else self.chip_hours * self.price.amount


def estimate(
    cost: Cost, fabric: Fabric, *, chips: int, work: Work | None = None, price: Price | None = None
) -> Estimate:
    """Of a program that was walked through (cost.py), on devices that stand in `fabric`."""
    row = fabric.row

    def kernel_seconds(op: Op) -> float:
        found = kernels.roofline(op.kernel, row) if op.kernel else None
        return found.seconds if found else 0.0

    def seconds(op: Op) -> float:
        return computing_seconds(op, row) + kernel_seconds(op)

    flights = overlap.play(cost.schedule, work=seconds, transfer=lambda what: network.trip(what, fabric))
    in_kernels = sum(kernel_seconds(op) * times for op, times in cost.schedule.each())
    computing = sum(computing_seconds(op, row) * times for op, times in cost.schedule.each())
    parts, exposed = {"compute": computing, "kernels": in_kernels}, {}
    for name in network.NETWORKS:
        exposed[f"exposed_{name}"] = sum((flight.exposed for flight in flights if flight.network == name), 0.0)
        parts[f"exposed_{name}"] = waited_share(name) * exposed[f"exposed_{name}"]
    found = _region_times(cost, seconds, kernel_seconds, flights, row)
    kernel_times = _kernel_times(cost, fabric)
    return Estimate(
        step_seconds=sum(parts.values()),
        parts=parts,
        exposed=exposed,
        compiler_seconds=cost.cycles / row.clock,
        incomplete=_incomplete(cost, kernel_times),
        constants=constants(),
        bound_by=_bound_by(parts, found),
        regions=found,
        hardware_flops=float(sum(each.flops for each in found.values()) * len(fabric.places)),
        kernels=tuple(kernel_times),
        flights=tuple(flights),
        operations=_longest(cost, seconds, row),
        chips=chips,
        devices=len(fabric.places),
        peak=row.peak * chips,
        work=work,
        price=price,
    )


def constants() -> dict[str, float]:
    """The fitted constants in force."""
    return {"CYCLE_SHARE": CYCLE_SHARE, "MATRIX_SHARE": MATRIX_SHARE, "EXPOSED_SHARE": EXPOSED_SHARE}


def waited_share(name: str) -> float:
    """The share of what the schedule leaves exposed of a network that a step waits for."""
    return EXPOSED_SHARE if name in (network.ICI, network.HBM) else 1.0


def _incomplete(cost: Cost, kernel_times: Sequence[KernelTime]) -> tuple[str, ...]:
    """Names of what an execution does and has no time: kernels without a roofline, work without cycles, loops of a
    length that nobody knows, which count once."""
    unknown = dict.fromkeys(kernel.name for kernel in kernel_times if kernel.seconds is None)
    return tuple(dict.fromkeys([*unknown, *cost.without_estimate, *cost.unknown_loops]))


def _longest(cost: Cost, seconds: Callable[[Op], float], row: Generation) -> tuple[OpTime, ...]:
    each = (OpTime(op, times, seconds(op) * times, _flops(op, row) * times) for op, times in cost.schedule.each())
    return tuple(sorted(each, key=lambda one: -one.seconds)[:OPERATIONS])


def computing_seconds(op: Op, row: Generation) -> float:
    """Of one execution of an operation on one device, kernels apart.

    A product takes its FLOPs at MATRIX_SHARE of the peak, and CYCLE_SHARE of what the compiler's estimate is above the
    peak. It is spared at most as much as its FLOPs need at the peak, so one that waits for memory (decoding) takes
    nearly what the compiler says. More cycles above the peak's are always more seconds.
    """
    said, at_peak = op.cycles / row.clock, _product_flops(op, row) / (row.peak / row.devices)
    above = max(said - at_peak, 0.0)
    return at_peak / MATRIX_SHARE + above - min((1 - CYCLE_SHARE) * above, at_peak)


def _product_flops(op: Op, row: Generation) -> int:
    """Of an operation's products, such that FLOPs over the bf16 peak are a time: half of those of numbers that the
    generation multiplies twice as fast."""
    return op.flops - sum(flops for kind, flops in op.eight_bits.items() if kind in row.twice_as_fast) // 2


def _flops(op: Op, row: Generation) -> int:
    """Of an operation's products, or of a kernel's whole blocks."""
    found = kernels.roofline(op.kernel, row) if op.kernel else None
    return _product_flops(op, row) + (found.flops if found else 0)


def _region_times(
    cost: Cost,
    seconds: Callable[[Op], float],
    kernel_seconds: Callable[[Op], float],
    flights: Sequence[Flight],
    row: Generation,
) -> dict[tuple[str, str], RegionTime]:
    """Longest first."""
    each = [(regions.classify(op.source), op, times) for op, times in cost.schedule.each()]
    waits = [(regions.classify(flight.op.source), flight) for flight in flights]

    cycles = regions.sums((key, op.cycles * times) for key, op, times in each)
    spent = regions.sums((key, seconds(op) * times) for key, op, times in each)
    in_kernels = regions.sums((key, kernel_seconds(op) * times) for key, op, times in each)
    exposed = regions.sums((key, flight.exposed) for key, flight in waits)
    waiting = regions.sums((key, waited_share(flight.network) * flight.exposed) for key, flight in waits)
    done = regions.sums((key, _flops(op, row) * times) for key, op, times in each)
    return {
        key: RegionTime(
            cycles=cycles.get(key, 0),
            seconds=spent.get(key, 0.0),
            in_kernels=in_kernels.get(key, 0.0),
            exposed=exposed.get(key, 0.0),
            waiting=waiting.get(key, 0.0),
            flops=done.get(key, 0),
        )
        for key in {**spent, **exposed}
    }


def _kernel_times(cost: Cost, fabric: Fabric) -> list[KernelTime]:
    found: dict[tuple, KernelTime] = {}
    for op, times in cost.schedule.each():
        if op.kernel is None:
            continue
        region, which = regions.classify(op.source)
        each = kernels.roofline(op.kernel, fabric.row)
        flops, seconds = (None, None) if each is None else (each.flops * times, each.seconds * times)
        key = (op.kernel.name, region, which, each)
        before = found.get(key)
        if before is not None:
            times += before.count
            flops = None if flops is None or before.flops is None else flops + before.flops
            seconds = None if seconds is None or before.seconds is None else seconds + before.seconds
        found[key] = KernelTime(op.kernel.name, region, which, times, flops, seconds)
    return list(found.values())


def _bound_by(parts: Mapping[str, float], spent: Mapping[tuple[str, str], RegionTime]) -> str:
    """The one thing that a step takes longest for, in words: computing, with the region that computes longest without
    its kernels; kernels; or waiting for one network."""
    largest = max(parts, key=lambda name: parts[name])
    region = regions.sums((region, each.seconds - each.in_kernels) for (region, _), each in spent.items())
    inside = f" in {next(iter(region))}" if largest == "compute" and region else ""
    return PARTS[largest] + inside
