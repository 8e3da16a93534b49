"""The section `adapter` of a config: which adapter a run trains in place of the model's own parameters."""

import dataclasses
import re

from t5x_like.core.config import VARIANT, nearest
from t5x_like.core.errors import UsageError

ADAPTERS = ("none", "lora")

# One rank, or one a layer, where 0 leaves the layer as it is.
Rank = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): x W + s (x A) B, of which A and B are trained.

    rank: of the product A B. alpha: s is alpha / rank, or alpha / sqrt(rank) if rank_stabilized (rsLoRA, arXiv
    2312.03732). dropout: share of x that is set to 0 before A, in training. targets: regexes over the paths of the
    matrices of layers, such as "layers/attention/(q|v)"; a matrix that one of them matches is adapted. A regex that
    matches none of these may name "embed/tokens" or "head/weight", which have no dropout. ranks: (regex, rank or one
    rank a layer) for the targets that differ, the first that matches counts.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    dropout: float
    targets: tuple[str, ...]
    ranks: tuple[tuple[str, Rank], ...]

    def check(self, path: str) -> None:
        if self.rank < 1:
            raise UsageError(f"{path}.rank={self.rank} should be at least 1; for no adapter set config.adapter.name")
        if not self.alpha > 0:
            raise UsageError(f"{path}.alpha={self.alpha:g} should be above 0; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{path}.dropout={self.dropout:g} should be in [0, 1)")
        if not self.targets:
            raise UsageError(f"{path}.targets is empty; '.*' is every matrix of the layers")
        for field, patterns in (("targets", self.targets), ("ranks", [pattern for pattern, _ in self.ranks])):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UsageError(f"{path}.{field}: {pattern!r} is no regular expression ({error.msg})") from None
        for pattern, rank in self.ranks:
            least = 1 if isinstance(rank, int) else 0
            if min((rank,) if isinstance(rank, int) else rank, default=-1) < least:
                raise UsageError(
                    f"{path}.ranks: {pattern!r} gets {rank!r}, which should be at least 1, or a tuple of one number a "
                    "layer, 0 for none"
                )


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """name: one of ADAPTERS. With an adapter the model's own parameters are all frozen: they are those of
    config.checkpoint.init_from."""

    name: str
    lora: LoraConfig | None = dataclasses.field(metadata=VARIANT)

    def check(self, path: str) -> None:
        if self.name not in ADAPTERS:
            raise UsageError(f"{path}.name={self.name!r} is unknown; {nearest(self.name, ADAPTERS)}")
