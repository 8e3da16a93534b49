"""What a lifecycle is about, and what differs: a decoder (llama), or an encoder-decoder (t5)."""

from typing import NamedTuple

from ml_collections import ConfigDict

from t5x_like.configs.pretrain import t5_tiny, tiny

LENGTH = 64  # tokens of a question with its answer, in the row of a decoder
SOURCE, ANSWER = 48, 20  # tokens of a question, and of an answer


class Kind(NamedTuple):
    """base: a run of the config `pretrain`, used as it is where it is finished. asked: a question as the model reads
    it; chat: whether the chat template "plain" writes it so, else it is the source of an encoder as it stands."""

    name: str
    base: str
    pretrain: str
    asked: str
    chat: bool


LLAMA = Kind("llama", "runs/tiny", "configs/pretrain/tiny.py", "User:\n{}\n\nAssistant:\n", chat=True)
T5 = Kind("t5", "runs/t5_tiny", "configs/pretrain/t5_tiny.py", "{}", chat=False)
KINDS = {each.name: each for each in (LLAMA, T5)}


def given(text: str) -> tuple[Kind, str]:
    """(kind, folder of the lifecycle) of the argument of a config, such as `t5,runs/lifecycle_t5`."""
    name, _, folder = text.partition(",")
    return KINDS[name], folder


def pretrained(kind: Kind) -> ConfigDict:
    """The config of the base."""
    return (tiny if kind is LLAMA else t5_tiny).get_config()
