"""THE table of what rows become: `config.data.features` names an entry.

| features | rows | for |
|---|---|---|
| causal | documents, concatenated or packed | decoders |
| source_target | packed examples, inputs beside targets | encoder-decoders |
| span_corruption | chunks of text with spans replaced by sentinels | pretraining of encoder-decoders |
| pairs | a prompt with a chosen and a rejected answer; with an encoder the prompt is its source | preferences |
| pair_texts | the same, each a whole text (with an encoder: answer) without targets | reward models |
| labels | a text with its class | classifiers |
| rollouts | a prompt with an answer of the policy | reinforcement learning |
"""

import dataclasses
import operator
from typing import Any

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import T5_NOISE, DataConfig
from t5x_like.data.read.causal import CAUSAL
from t5x_like.data.read.interface import Feature
from t5x_like.data.read.pairs_apart import PAIR_TEXTS, PAIRS
from t5x_like.data.read.rollouts import ROLLOUTS
from t5x_like.data.read.sequences import LABELS
from t5x_like.data.read.source_target import SOURCE_TARGET
from t5x_like.data.read.span_corruption import SPAN_CORRUPTION

FEATURES: dict[str, Feature] = {
    "causal": CAUSAL,
    "source_target": SOURCE_TARGET,
    "span_corruption": SPAN_CORRUPTION,
    "pairs": PAIRS,
    "pair_texts": PAIR_TEXTS,
    "labels": LABELS,
    "rollouts": ROLLOUTS,
}


def arrays(config: DataConfig) -> dict[str, ArraySpec]:
    """{name: shape, type and axes} of a global batch; opens no data, so that a plan can ask for it."""
    check(config)
    return FEATURES[config.features].arrays(config)


def check(config: DataConfig) -> None:
    """UsageError for fields that do not fit `config.features`; the range of each is checked by DataConfig."""
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
    has_encoder = config.encoder_length > 0 if feature.encoder is None else feature.encoder
    neutral: dict[str, Any] = {} if has_encoder else {"encoder_length": 0, "start_token": "pad"}
    if feature is not CAUSAL:
        neutral |= {"attend_across_documents": False, "validation_stride": 0, "prefix": False}
    if has_encoder and feature in (SOURCE_TARGET, PAIRS, PAIR_TEXTS):
        neutral |= {"truncate.min_targets": 0}  # targets have a row of their own
    if feature is not SPAN_CORRUPTION:
        neutral |= {f"span_corruption.{name}": value for name, value in dataclasses.asdict(T5_NOISE).items()}
    for name, value in neutral.items():
        given = operator.attrgetter(name)(config)
        if given != value:
            raise UsageError(
                f"config.data.{name}={given} has no effect with features={config.features!r}; leave it at {value}"
            )
