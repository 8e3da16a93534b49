"""Checks the shapes and types written in signatures at every call, under pytest alone: jaxtyping names it by path.

Numbers may be of numpy or Python, and a whole number passes for a float, as Python has it.
"""

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintException

_checked = beartype(
    conf=BeartypeConf(hint_overrides=FrozenDict({int: int | np.integer, float: float | int | np.number}))
)


def check(function):
    try:
        return _checked(function)
    except BeartypeDecorHintException:
        # A hint for people and the type checker alone, such as a Protocol of functions.
        return function
