"""What an evaluation found: the metrics of one model, with what each document contributes to them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

Item = float | tuple[Any, ...]
Aggregate = Callable[[Sequence[Item]], float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric of one task.

    filter: how answers were cleaned before they were counted, "none" where they were not. error: the standard error of
    the value, None where there is none. items: what each document contributes; documents: which it is, equal for two
    models exactly where it is the same. Both are empty for a group of tasks. aggregate: from items to the value.
    """

    task: str
    name: str
    filter: str
    value: float
    error: float | None
    higher_is_better: bool | None
    items: tuple[Item, ...]
    documents: tuple[str, ...]
    aggregate: Aggregate

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.name, self.filter


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found about one model. shots: {task: number of examples before a question}; truncated: requests whose
    beginning did not fit the model; samples: {task: what the harness says of each document}."""

    model: str
    metrics: tuple[Metric, ...]
    shots: dict[str, int]
    truncated: int
    samples: dict[str, list[dict[str, Any]]]
