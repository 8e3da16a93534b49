"""Whether a run of reinforcement learning that goes on in the middle of an iteration may use the answers it finds.

They belong to the prompts, keys and updates of the run that drew them. What a branch or a resume changes of these is
found by what every checkpoint says of its run: its config and the fingerprints of its prompts and its tokenizer.
"""

from collections.abc import Mapping
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.runs.sections import value
from t5x_like.storage import model_directory, paths
from t5x_like.storage.workdir import differences

# What pending answers, their rewards and their log-probabilities follow from, and which of them an update takes.
_FIELDS = (
    "seed",
    *(f"rl.{name}" for name in ("prompts", "samples", "epochs", "new_tokens", "end_tokens", "generate")),
    *(f"rl.{name}" for name in ("rewards", "failure_value", "answers_per_row")),
    *(f"data.{name}" for name in ("batch_size", "length", "encoder_length", "start_token", "extra_ids", "truncate")),
    *(f"objective.grpo.{name}" for name in ("temperature", "reference")),
)


def changes(checkpoint: str, *, config: Mapping[str, Any], data: str, tokenizer: str, branch: bool) -> list[str]:
    """What has changed of that since a checkpoint was written; none: its answers are those of this run, bit for bit.

    `config` is that of this run as it is stored, `data` and `tokenizer` the fingerprints of its prompts and tokenizer.
    A resume finds the parameters of its roles by their fingerprints, wherever they lie; in a branch sources count.
    Raises UserError for another tokenizer, whose tokens the parameters do not know.
    """
    note = model_directory.read_metadata(checkpoint)
    before = note.get("provenance", {})
    if before.get("tokenizer", tokenizer) != tokenizer:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer ({before['tokenizer'][:12]}, here {tokenizer[:12]}); set "
            "config.data.tokenizer to that of the run"
        )
    fields = (*_FIELDS, "roles") if branch else _FIELDS
    found = [str(each) for each in differences(note["config"], paths.as_json(config)) if each.within(fields)]
    if before.get("data", data) != data:
        found.append(f"prompts: fingerprint {before['data'][:12]} -> {data[:12]}")
    return found


def pending(checkpoint: str, step: int) -> bool:
    """Whether the checkpoint was written between two updates of an iteration."""
    config = model_directory.read_metadata(checkpoint)["config"]
    answers = value(config, "rl.prompts") * value(config, "rl.samples")
    return bool(step % max(1, value(config, "rl.epochs") * answers // value(config, "data.batch_size")))
