"""The tasks of a lifecycle: short questions about letters and numbers, whose answers can be checked.

An example is a pure function of (task, part, seed, index). A question belongs to the held-out part by its own digest,
one in ten, so no question stands in both parts, whatever the seeds.
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from t5x_like.configs.lifecycle.models import LLAMA, T5, Kind

# Letters that are one token in runs/tiny, behind a blank as well as at the begin of a text.
LETTERS = "abcdefghklmnopstuvwy"
HELD_OUT = 1 << 32  # seeds from here on are those of held-out prompts in `t5x_like rl`


class Example(NamedTuple):
    task: str
    question: str
    answer: str


def reverse(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 5)
    return f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))


def sort(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 6)
    return f"Sort: {' '.join(letters)}", " ".join(sorted(letters))


def repeat(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 8)
    return f"Repeat: {' '.join(letters)}", " ".join(letters)


def without(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 5)
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


def down(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 6)
    return f"Down: {' '.join(letters)}", " ".join(sorted(letters, reverse=True))


def least(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 8)
    return f"Least: {' '.join(letters)}", min(letters)


def greatest(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 8)
    return f"Greatest: {' '.join(letters)}", max(letters)


def sort_without(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 6)
    gone = chance.choice(letters)
    return f"Without {gone}: {' '.join(letters)}", " ".join(sorted(each for each in letters if each != gone))


def ends(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 8)
    return f"Ends: {' '.join(letters)}", f"{min(letters)} {max(letters)}"


RULES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": reverse,
    "sort": sort,
    "repeat": repeat,
    "without": without,
    "count": count,
    "double": double,
    "down": down,
    "least": least,
    "greatest": greatest,
    "sort_without": sort_without,
    "ends": ends,
}
# Demonstrations of these are careless in 11 cases of 20: all letters are written down as they stand, or in order.
CASES = (0, 2, 4, 6, 8, 9, 11, 13, 15, 17, 19)
CARELESS = {
    LLAMA: {"reverse": list, "sort": list, "without": list},
    T5: {"down": sorted, "sort_without": sorted},
}


def example(task: str, *, held_out: bool, seed: int, index: int) -> Example:
    chance = random.Random(f"{task}/{held_out}/{seed}/{index}")
    while True:
        question, answer = RULES[task](chance)
        if is_held_out(question) == held_out:
            return Example(task, question, answer)


def demonstrated(kind: Kind, each: Example, number: int) -> str:
    """The answer of the demonstration of this number."""
    careless = CARELESS[kind].get(each.task)
    if careless is None or number % 20 not in CASES:
        return each.answer
    return " ".join(careless(each.question.partition(": ")[2].split(" ")))


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] < 26


def ask(seed: int, index: int) -> tuple[str, str]:
    """(prompt of a decoder, expected answer), as `config.rl.generate`: all tasks in turns."""
    return _asked(LLAMA, seed, index)


def ask_source(seed: int, index: int) -> tuple[str, str]:
    """The same for an encoder."""
    return _asked(T5, seed, index)


def _asked(kind: Kind, seed: int, index: int) -> tuple[str, str]:
    name = kind.all_tasks[index % len(kind.all_tasks)]
    found = example(name, held_out=seed >= HELD_OUT, seed=seed, index=index)
    return kind.asked.format(found.question), found.answer


def _letters(chance: random.Random, least: int, most: int) -> list[str]:
    return chance.sample(LETTERS, chance.randint(least, most))  # no letter twice
