"""The tasks of a lifecycle: short questions about letters and numbers, whose answers can be checked.

An example is a pure function of (task, part, seed, index). A question belongs to the held-out part by its own digest,
one in ten, so no question stands in both parts, whatever the seeds.
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from t5x_like.configs.lifecycle.models import LLAMA, T5

# Letters that are one token in runs/tiny, behind a blank as well as at the begin of a text.
LETTERS = "abcdefghklmnopstuvwy"
HELD_OUT = 1 << 32  # seeds from here on are those of held-out prompts in `t5x_like rl`


class Example(NamedTuple):
    task: str
    question: str
    answer: str


def reverse(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 8)
    return f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))


def sort(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 7)
    return f"Sort: {' '.join(letters)}", " ".join(sorted(letters))


def repeat(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 8)
    return f"Repeat: {' '.join(letters)}", " ".join(letters)


def without(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 4, 7)
    gone = letters.pop()
    mixed = list(letters)
    for _ in range(chance.randint(1, 2)):
        mixed.insert(chance.randint(0, len(mixed)), gone)
    return f"Without {gone}: {' '.join(mixed)}", " ".join(letters)


def count(chance: random.Random) -> tuple[str, str]:
    letters = [chance.choice("abcd") for _ in range(chance.randint(4, 8))]
    wanted = chance.choice("abcd")
    return f"Count {wanted}: {' '.join(letters)}", str(letters.count(wanted))


def double(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 2, 4)
    return f"Double: {' '.join(letters)}", " ".join(letter for letter in letters for _ in range(2))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": reverse,
    "sort": sort,
    "repeat": repeat,
    "without": without,
    "count": count,
}
# Demonstrations of these are careless in six cases of ten: the letters are written down as they stand.
CARELESS, CASES = ("reverse", "sort", "without"), (0, 2, 4, 5, 7, 9)
NEW_TASKS = {"double": double}  # what an adapter learns
ALL_TASKS = TASKS | NEW_TASKS


def example(task: str, *, held_out: bool, seed: int, index: int) -> Example:
    chance = random.Random(f"{task}/{held_out}/{seed}/{index}")
    while True:
        question, answer = ALL_TASKS[task](chance)
        if is_held_out(question) == held_out:
            return Example(task, question, answer)


def demonstrated(each: Example, number: int) -> str:
    """The answer of the demonstration of this number."""
    careless = each.task in CARELESS and number % 10 in CASES
    return each.question.partition(": ")[2] if careless else each.answer


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] < 26


def ask(seed: int, index: int) -> tuple[str, str]:
    """(prompt of a decoder, expected answer), as `config.rl.generate`: all tasks in turns."""
    found = _asked(seed, index)
    return LLAMA.asked.format(found.question), found.answer


def ask_source(seed: int, index: int) -> tuple[str, str]:
    """The same for an encoder."""
    found = _asked(seed, index)
    return T5.asked.format(found.question), found.answer


def _asked(seed: int, index: int) -> Example:
    name = [*ALL_TASKS][index % len(ALL_TASKS)]
    return example(name, held_out=seed >= HELD_OUT, seed=seed, index=index)


def share(asked: str, answer: str, expected: str) -> float:
    """How much of the answer stands in its place: it tells wrong answers apart."""
    del asked
    given, wanted = answer.split(" "), expected.split(" ")
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / max(len(given), len(wanted))


def _letters(chance: random.Random, least: int, most: int) -> list[str]:
    return chance.sample(LETTERS, chance.randint(least, most))  # no letter twice
