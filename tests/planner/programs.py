"""Small compiled programs written out, of which every figure can be counted by hand."""

import numpy as np

from t5x_like.core import accelerators
from t5x_like.planner.time import regions
from t5x_like.planner.time.network import Fabric


def module(main, computations=""):
    return f"HloModule m\n{computations}\nENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n{main}\n}}\n"


def computation(name, *lines):
    return "\n".join([f"%{name} (a: f32[8,128]) -> f32[8,128] {{", *lines, "}", ""])


def cycles(count):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def named(source):
    return f'metadata={{op_name="{source}"}}'


def by_region(schedule):
    """Cycles of each (region, pass) of a program, largest first."""
    return regions.sums((regions.classify(op.source), op.cycles * times) for op, times in schedule.each())


def fabric(name, mesh, *, slices=1):
    """A whole slice, or several, whose devices lie along the mesh in the order of their places."""
    asked = accelerators.parse(name)
    dims = (*asked.dims, *[1] * (3 - len(asked.dims)))
    places = [
        (number, x, y, z, core)
        for number in range(slices)
        for x in range(dims[0])
        for y in range(dims[1])
        for z in range(dims[2])
        for core in range(asked.row.devices)
    ]
    wraps = accelerators.wraps(asked.dims)[: asked.row.dims]
    return Fabric(asked.row, mesh, np.array(places), asked.dims, wraps)
