"""What a lifecycle is about, and what differs: a decoder (llama), or an encoder-decoder (t5)."""

from typing import NamedTuple

from ml_collections import ConfigDict

from t5x_like.configs.pretrain import t5_tiny, tiny

LENGTH = 64  # tokens of a question with its answer, in the row of a decoder
SOURCE, ANSWER = 48, 20  # tokens of a question, and of an answer


class Kind(NamedTuple):
    """base: a run of the config `pretrain`, used as it is where it is finished. asked: a question as the model reads
    it; chat: whether the chat template "plain" writes it so, else it is the source of an encoder as it stands. tasks:
    what instruction tuning teaches, those of tasks.py; new: what an adapter does. seed: of all runs behind the base."""

    name: str
    base: str
    pretrain: str
    asked: str
    chat: bool
    tasks: tuple[str, ...]
    new: str
    seed: int = 0

    @property
    def all_tasks(self) -> tuple[str, ...]:
        return (*self.tasks, self.new)


LLAMA = Kind(
    name="llama",
    base="runs/tiny",
    pretrain="configs/pretrain/tiny.py",
    asked="User:\n{}\n\nAssistant:\n",
    chat=True,
    tasks=("reverse", "sort", "repeat", "without", "count"),
    new="double",
)
# A T5 of this size learns little of the order in which letters stand in minutes: its answers are alphabetic.
T5 = Kind(
    name="t5",
    base="runs/t5_tiny",
    pretrain="configs/pretrain/t5_tiny.py",
    asked="{}",
    chat=False,
    tasks=("sort", "down", "least", "greatest", "sort_without"),
    new="ends",
)
KINDS = {each.name: each for each in (LLAMA, T5)}


def given(text: str) -> tuple[Kind, str]:
    """(kind, folder of the lifecycle) of the argument of a config, such as `t5,runs/lifecycle_t5`."""
    name, _, folder = text.partition(",")
    return KINDS[name], folder


def pretrained(kind: Kind) -> ConfigDict:
    """The config of the base."""
    return (tiny if kind == LLAMA else t5_tiny).get_config()
