"""What the section `rl` of a config holds: how many answers, how they are ended, judged and turned into advantages.

A field that takes a function is given one in the config FILE (`config.rl.rewards.mine.function = my_function`); what
is stored of it is its name, so that nobody's checkpoint brings code along.
"""

import dataclasses
import re

from t5x_like.core.config import RESUME_MAY_CHANGE, nearest
from t5x_like.core.errors import UsageError

KINDS = ("exact", "number", "regex", "function", "model")
TRUNCATED = ("keep", "leave_out")
WEIGHTS = ("gathered", "sharded")
SCALES = ("std", "none")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One part of the reward, `config.rl.rewards.NAME`; a sample's reward is the sum over parts of weight x value.

    kind: "exact" (the answer is the expected one, blanks at both ends aside), "number" (its last number is that of the
        expected answer), "regex" (`pattern` matches somewhere; with a group named `answer`, that is the expected one),
        "function" (a `function(prompt, answer, expected)` of the config file, which returns a number), "model" (what
        the reward model config.roles.reward says of prompt and answer)
    """

    kind: str
    weight: float
    pattern: str
    function: str | None

    def check(self, path: str) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"{path}.kind={self.kind!r} is unknown; {nearest(self.kind, KINDS)}")
        if (self.kind == "regex") != bool(self.pattern):
            raise UsageError(f"{path}.pattern={self.pattern!r} belongs to kind='regex', and the kind is {self.kind!r}")
        if (self.kind == "function") != (self.function is not None):
            raise UsageError(
                f"{path}.function={self.function!r} belongs to kind='function', and the kind is {self.kind!r}"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"{path}.pattern={self.pattern!r} is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """(reward - mean) / (std + epsilon) over the answers to one prompt, in float64.

    scale: "std", or "none" to leave out the division; ddof: std divides by samples - ddof (0 or 1)
    """

    scale: str
    ddof: int
    epsilon: float

    def check(self, path: str) -> None:
        if self.scale not in SCALES:
            raise UsageError(f"{path}.scale={self.scale!r} is unknown; {nearest(self.scale, SCALES)}")
        if self.ddof not in (0, 1):
            raise UsageError(f"{path}.ddof={self.ddof} should be 0 or 1")
        if not self.epsilon > 0:
            raise UsageError(f"{path}.epsilon={self.epsilon:g} should be above 0")


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """Of one iteration: `prompts` x `samples` answers, and the updates that are made of them.

    answers_per_row: answers that share a row of an update, and their prompt in it, which is computed once for all of
        them; 1: each has a row of its own. It divides samples
    epochs: how often each answer is trained on; updates of an iteration: epochs x answers / config.data.batch_size
    new_tokens: the most that an answer has, its end token among them. A row of config.data.length tokens holds prompt
        and answer; with an encoder, whose rows hold the prompt, it is new_tokens
    rows: answers that are decoded at once, 0 for all
    weights: how the policy lies on the mesh while it answers. "gathered": whole on every device but for what tensor
        parallelism divides, in the compute type, so that FSDP gathers it once a rollout; "sharded": as in training,
        which needs less memory and gathers the whole policy again for every token
    end_tokens: what ends an answer: "eos", or a text that is one token
    truncated: answers that new_tokens ended: "keep", or "leave_out" of the loss (the advantages still see them)
    generate: function(seed, index) -> (prompt, expected answer) of the config file, in place of config.data.source
    held_out: prompts of an evaluation, which answers greedily: generated ones, or the first of config.data.validation
        (0 for all of these)
    rewards: RewardConfig by name
    reward_seconds: how long one function or pattern may take for one answer; then, or when it raises, its value is
        failure_value
    """

    prompts: int
    samples: int
    answers_per_row: int
    epochs: int
    new_tokens: int
    rows: int = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    weights: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    end_tokens: tuple[str, ...]
    truncated: str
    generate: str | None
    held_out: int = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    advantage: AdvantageConfig
    rewards: dict[str, RewardConfig]
    reward_seconds: float = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    failure_value: float

    @property
    def reward_model(self) -> bool:
        return any(part.kind == "model" for part in self.rewards.values())

    @property
    def answers(self) -> int:
        return self.prompts * self.samples

    def check(self, path: str) -> None:
        for field, least in (("prompts", 1), ("epochs", 1), ("new_tokens", 1), ("rows", 0), ("held_out", 0)):
            if getattr(self, field) < least:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be at least {least}")
        if self.answers_per_row < 1 or self.samples % self.answers_per_row:
            raise UsageError(
                f"{path}.answers_per_row={self.answers_per_row} should divide {path}.samples={self.samples}: a row "
                "holds answers to one prompt"
            )
        if self.samples < 2:
            raise UsageError(f"{path}.samples={self.samples} should be at least 2: answers are compared in their group")
        if self.weights not in WEIGHTS:
            raise UsageError(f"{path}.weights={self.weights!r} is unknown; {nearest(self.weights, WEIGHTS)}")
        if self.truncated not in TRUNCATED:
            raise UsageError(f"{path}.truncated={self.truncated!r} is unknown; {nearest(self.truncated, TRUNCATED)}")
        if not self.end_tokens:
            raise UsageError(f"{path}.end_tokens is empty; name 'eos' or a text that is one token")
        if not self.rewards:
            raise UsageError(f"{path}.rewards is empty; name at least one, by common.reward(...)")
        if not self.reward_seconds > 0:
            raise UsageError(f"{path}.reward_seconds={self.reward_seconds:g} should be above 0")
        if self.rows and self.answers % self.rows:
            raise UsageError(f"{path}.rows={self.rows} does not divide {path}.prompts x samples = {self.answers}")
