"""A weight that is no plain array, for the tests of storage: int8 values with scales, its axes static."""

import functools

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["axes"])
class Quantized:
    kind = "quantized"

    def __init__(self, values, scales, axes):
        self.values, self.scales, self.axes = values, scales, axes

    @property
    def shape(self):
        return self.values.shape


CONSTRUCTORS = {"quantized": lambda parts, shape, axes: Quantized(parts["values"], parts["scales"], axes)}
