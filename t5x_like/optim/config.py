"""The section `config.optim`: dataclasses of optimizers, schedules and rule lists, and the bounds of their values.

No defaults (they stand in configs/common) and no mathematics.

A rule list is ((regex, value), ...): the first regex that matches a whole path such as `layers/mlp/up` gives the
value, every parameter must be covered, and a rule that matches no parameter is an error. A value is one number, or
one number per layer: a tuple whose length is the size of the leaf's `layers` dim. JSON's lists are accepted too.
On a command line: --config.optim.decay='(("embed/.*", 0.0), (".*", 1.0))'.
"""

import dataclasses
from typing import TypeAlias

from t5x_like.core.config import RESUME_MAY_CHANGE, VARIANT, nearest
from t5x_like.core.errors import UsageError

NumberRules: TypeAlias = tuple[tuple[str, float | tuple[float, ...]], ...]
SCHEDULES = ("constant", "cosine", "linear", "rsqrt", "warmup_stable_decay")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")

SwitchRules: TypeAlias = tuple[tuple[str, bool | tuple[bool, ...]], ...]


@dataclasses.dataclass(frozen=True)
class CosineConfig:
    """Half a cosine from the peak to `final_fraction` x peak, reached at the last step."""

    final_fraction: float

    def check(self, path: str) -> None:
        fraction(self.final_fraction, f"{path}.final_fraction")


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """A straight line from the peak to `final_fraction` x peak, reached at the last step."""

    final_fraction: float

    def check(self, path: str) -> None:
        fraction(self.final_fraction, f"{path}.final_fraction")


@dataclasses.dataclass(frozen=True)
class RsqrtConfig:
    """The inverse square root of T5: constant for `timescale` steps, then sqrt(timescale / t); None: warmup_steps."""

    timescale: int | None

    def check(self, path: str) -> None:
        _within(self, path, "timescale", low=1)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecayConfig:
    """Constant, then down to `final_fraction` x peak over the last `decay_fraction` of all steps.

    shape: `linear`, `cosine` or `sqrt` (1 - sqrt(progress), arXiv 2405.18392)
    """

    decay_fraction: float
    final_fraction: float
    shape: str

    def check(self, path: str) -> None:
        fraction(self.decay_fraction, f"{path}.decay_fraction")
        fraction(self.final_fraction, f"{path}.final_fraction")
        one_of(self.shape, ("linear", "cosine", "sqrt"), f"{path}.shape")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """name: `constant`, `cosine`, `linear`, `rsqrt` or `warmup_stable_decay`; warmup_steps: linear, 0 for none.

    steps: its length in updates; None is config.loop.steps of the first start, whatever a resume does to that. A run
        that goes on past the end of a schedule that ends at 0 is refused.
    """

    name: str
    steps: int | None
    warmup_steps: int
    cosine: CosineConfig | None = dataclasses.field(metadata=VARIANT)
    linear: LinearConfig | None = dataclasses.field(metadata=VARIANT)
    rsqrt: RsqrtConfig | None = dataclasses.field(metadata=VARIANT)
    warmup_stable_decay: WarmupStableDecayConfig | None = dataclasses.field(metadata=VARIANT)

    def check(self, path: str) -> None:
        one_of(self.name, SCHEDULES, f"{path}.name")
        _within(self, path, "steps", low=1)
        _within(self, path, "warmup_steps", low=0)


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """Decay rates of the first and second moment, and what is added to the root of the second."""

    b1: float
    b2: float
    eps: float

    def check(self, path: str) -> None:
        _within(self, path, "b1", "b2", low=0, high=1)
        _within(self, path, "eps", low=0)


@dataclasses.dataclass(frozen=True)
class AdafactorConfig:
    """Shazeer and Stern, arXiv 1804.04235.

    decay_rate: exponent c of the second moment's decay 1 - t^-c
    eps: added to squared gradients
    clip_threshold: limit of the root mean square of one tensor's update; None for none
    min_scale: the step is multiplied by max(min_scale, rms of the tensor); None: not multiplied
    momentum: decay of a running average of updates (costs a moment as large as the parameters); None for none
    min_dim_size_to_factor: matrices with a smaller side keep the whole second moment
    """

    decay_rate: float
    eps: float
    clip_threshold: float | None
    min_scale: float | None
    momentum: float | None
    min_dim_size_to_factor: int

    def check(self, path: str) -> None:
        _within(self, path, "decay_rate", "eps", "min_scale", low=0)
        _within(self, path, "clip_threshold", low=0, low_open=True)
        _within(self, path, "momentum", low=0, high=1)
        _within(self, path, "min_dim_size_to_factor", low=2)


@dataclasses.dataclass(frozen=True)
class LionConfig:
    """b1 mixes the gradient into the update, b2 into the momentum (arXiv 2302.06675)."""

    b1: float
    b2: float

    def check(self, path: str) -> None:
        _within(self, path, "b1", "b2", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Matrices by Muon; embeddings, head, norms and vectors by AdamW.

    steps: Newton-Schulz iterations
    scale: of the orthogonal update: `keller`, sqrt(max(1, fan_out / fan_in)), made for learning rates near 0.02
      (kellerjordan.github.io/posts/muon); `rms`, rms x sqrt(max(fan_in, fan_out)), made for those of AdamW
      (arXiv 2502.16982, eq. 4)
    rms: root mean square of an update under `scale="rms"`; 0.2 is AdamW's usual one
    adam_multiplier: learning rate of the AdamW part as a multiple of config.optim.learning_rate
    adam: the AdamW part
    """

    momentum: float
    nesterov: bool
    steps: int
    scale: str
    rms: float
    adam_multiplier: float
    adam: AdamWConfig

    def check(self, path: str) -> None:
        _within(self, path, "momentum", low=0, high=1)
        _within(self, path, "steps", low=1)
        _within(self, path, "rms", "adam_multiplier", low=0)
        one_of(self.scale, ("keller", "rms"), f"{path}.scale")


@dataclasses.dataclass(frozen=True)
class SGDConfig:
    """momentum 0 keeps no state."""

    momentum: float
    nesterov: bool

    def check(self, path: str) -> None:
        _within(self, path, "momentum", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Everything between a gradient and the change of a parameter.

    name: `adamw`, `adafactor`, `lion`, `muon` or `sgd`
    learning_rate: the schedule's peak
    clip_norm: limit of the global norm of the gradient; None or 0 for none
    weight_decay: decoupled; a step takes learning_rate x weight_decay of the parameter away, as torch's AdamW does
    decay: rules, factors of weight_decay
    multiplier: rules, factors of learning_rate (of its decay too, as with torch's parameter groups)
    freeze: rules, True for what is not trained
    """

    name: str
    learning_rate: float = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    schedule: ScheduleConfig = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    clip_norm: float | None
    weight_decay: float
    decay: NumberRules
    multiplier: NumberRules
    freeze: SwitchRules
    adamw: AdamWConfig | None = dataclasses.field(metadata=VARIANT)
    adafactor: AdafactorConfig | None = dataclasses.field(metadata=VARIANT)
    lion: LionConfig | None = dataclasses.field(metadata=VARIANT)
    muon: MuonConfig | None = dataclasses.field(metadata=VARIANT)
    sgd: SGDConfig | None = dataclasses.field(metadata=VARIANT)

    def check(self, path: str) -> None:
        if self.name not in OPTIMIZERS:
            raise UsageError(f"{path}.name={self.name!r} is unknown; {nearest(self.name, OPTIMIZERS)}")
        _within(self, path, "learning_rate", "weight_decay", "clip_norm", low=0)


def one_of(value: str, known: tuple[str, ...], path: str) -> None:
    if value not in known:
        raise UsageError(f"{path}={value!r} is unknown; known: {', '.join(known)}")


def fraction(value: float, path: str) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"{path}={value} should be a fraction from 0 to 1")


def _within(section: object, path: str, *fields: str, low: float, high: float | None = None, low_open: bool = False):
    """Each field that is not None is at least (`low_open`: above) `low` and below `high`."""
    for field in fields:
        value = getattr(section, field)
        if value is None:
            continue
        too_low = not value >= low or (low_open and value == low)  # `not >=` refuses NaN too
        if too_low or (high is not None and value >= high):
            expected = f"{'above' if low_open else 'at least'} {low}" + ("" if high is None else f" and below {high}")
            raise UsageError(f"{path}.{field}={value} should be {expected}")
