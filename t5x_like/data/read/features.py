"""THE table of what rows become: `config.data.features` names an entry.

| features | rows | for |
|---|---|---|
| causal | documents, concatenated or packed | decoders |
| source_target | packed examples, inputs beside targets | encoder-decoders |
| span_corruption | chunks of text with spans replaced by sentinels | pretraining of encoder-decoders |
| pairs | a prompt with a chosen and a rejected answer | preferences |
| labels | a text with its class | classifiers |
"""

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read.causal import CAUSAL
from t5x_like.data.read.interface import Feature
from t5x_like.data.read.sequences import LABELS, PAIRS
from t5x_like.data.read.source_target import SOURCE_TARGET
from t5x_like.data.read.span_corruption import SPAN_CORRUPTION

FEATURES: dict[str, Feature] = {
    "causal": CAUSAL,
    "source_target": SOURCE_TARGET,
    "span_corruption": SPAN_CORRUPTION,
    "pairs": PAIRS,
    "labels": LABELS,
}


def arrays(config: DataConfig) -> dict[str, ArraySpec]:
    """{name: shape, type and axes} of a global batch; opens no data, so that a plan can ask for it."""
    check(config)
    return FEATURES[config.features].arrays(config)


def check(config: DataConfig) -> None:
    """UsageError for fields that no batch can be made of."""
    for name, least in (("batch_size", 1), ("length", 1), ("validation_batches", 0), ("prefetch", 0)):
        if getattr(config, name) < least:
            raise UsageError(f"config.data.{name}={getattr(config, name)} should be at least {least}")
    if not 0 <= config.validation_stride <= config.length:
        raise UsageError(
            f"config.data.validation_stride={config.validation_stride} should lie between 0 and length={config.length}"
        )
    if config.features not in FEATURES:
        raise UsageError(f"config.data.features={config.features!r} is unknown; {nearest(config.features, FEATURES)}")
    feature = FEATURES[config.features]
    if config.packing not in feature.packings:
        raise UsageError(
            f"config.data.packing={config.packing!r} does not go with features={config.features!r}; "
            f"{nearest(config.packing, feature.packings)}"
        )
    _check_unused(config, feature)
    feature.check(config)


def _check_unused(config: DataConfig, feature: Feature) -> None:
    """What belongs to some features alone has its neutral value elsewhere."""
    if feature.encoder and config.encoder_length < 1:
        raise UsageError(f"config.data.encoder_length={config.encoder_length} should be at least 1: tokens of a source")
    neutral = {} if feature.encoder else {"encoder_length": 0}
    if feature is not CAUSAL:
        neutral |= {"attend_across_documents": False, "validation_stride": 0, "prefix": False}
    for name, value in neutral.items():
        if getattr(config, name) != value:
            raise UsageError(
                f"config.data.{name}={getattr(config, name)} has no effect with features={config.features!r}; "
                f"leave it at {value}"
            )
