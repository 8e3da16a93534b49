"""The constants of the plan's estimate that are fitted to published rows: where they stand, and between which bounds.

Each is a literal of the planner with a meaning of its own; what is printed by --fit is written there by hand. The
efficiency of attention kernels (kernels.EFFICIENCY) and the speed of links (network.LINK_SHARE) are not among them: so
few rows cannot tell these from the others.
"""

import contextlib
from collections.abc import Iterator, Mapping
from types import ModuleType

from t5x_like.planner.time import estimate
from tools.calibrate.fit import Constant

# name: (module, start, low, high). The starts are what one would say without any measurement.
_PLACES: Mapping[str, tuple[ModuleType, float, float, float]] = {
    # Below 0.1 the compiler's cycles would hardly be read, and no search could tell one program from another.
    "CYCLE_SHARE": (estimate, 1.0, 0.1, 1.2),
    "MATRIX_SHARE": (estimate, 0.95, 0.7, 1.0),
    "EXPOSED_SHARE": (estimate, 1.0, 0.1, 1.5),
}
CONSTANTS = tuple(Constant(name, start, low, high) for name, (_, start, low, high) in _PLACES.items())


def in_force() -> dict[str, float]:
    """The values that a plan uses."""
    return {name: getattr(place[0], name) for name, place in _PLACES.items()}


@contextlib.contextmanager
def using(values: Mapping[str, float]) -> Iterator[None]:
    """Estimates with other values."""
    before = in_force()
    try:
        for name, value in values.items():
            setattr(_PLACES[name][0], name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(_PLACES[name][0], name, value)
