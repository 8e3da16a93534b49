"""Rows of answers that a policy gave itself: the arrays of a batch whose content `t5x_like rl` makes while it runs.

A row holds one prompt and its answer. With an encoder (`encoder_length` above 0) the prompt is its source, and a row of
the decoder holds the answer alone; else it holds the prompt and the answer. There is no token cache to read.

`branched_arrays` are those of rows that hold a prompt and several answers to it (SeveralARow of rl/rows.py).

old_logp, reference_logp, rollout_logp: log-probabilities of targets, see objectives/grpo.py. advantages, on_policy: one
number a row.
"""

from typing import NoReturn

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read.interface import Feature, per_token

_ENCODER = {"encoder_inputs": "int32", "encoder_segment_ids": "int32"}
_TOKENS = {"inputs": "int32", "targets": "int32", "segment_ids": "int32", "loss_weights": "float32"}
_SCORES = {"old_logp": "float32", "reference_logp": "float32", "rollout_logp": "float32"}
_ROWS = ("advantages", "on_policy")


def arrays(config: DataConfig) -> dict[str, ArraySpec]:
    encoder = per_token(config, _ENCODER, config.encoder_length) if config.encoder_length else {}
    rows = {name: ArraySpec((config.batch_size,), "float32", ("batch",)) for name in _ROWS}
    return encoder | per_token(config, _TOKENS | _SCORES, config.length) | rows


def branched_arrays(*, rows: int, room: int, answers: int, tokens: int) -> dict[str, ArraySpec]:
    """room: of the prompt; tokens: the most of an answer."""
    whole = room + answers * (tokens - 1)

    def spec(dtype: str, *shape: int) -> ArraySpec:
        return ArraySpec((rows, *shape), dtype, ("batch", *(None,) * len(shape)))

    per_answer = {name: spec(dtype, answers, tokens) for name, dtype in {**_SCORES, "loss_weights": "float32"}.items()}
    return {
        "inputs": spec("int32", room),
        "branches": spec("int32", answers, tokens - 1),
        "segment_ids": spec("int32", whole),
        "positions": spec("int32", whole),
        "targets": spec("int32", answers, tokens),
        **per_answer,
        **{name: spec("float32", answers) for name in _ROWS},
    }


def _open(*_: object) -> NoReturn:
    raise UsageError(
        "config.data.features='rollouts' are made while a run goes, from prompts; start it by `t5x_like rl`"
    )


ROLLOUTS = Feature(packings=("single",), encoder=None, arrays=arrays, open=_open, check=lambda config: None)
