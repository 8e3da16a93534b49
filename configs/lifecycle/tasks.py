"""The tasks of a lifecycle: short questions about letters and numbers, whose answers can be checked.

An example is a pure function of (task, part, seed, index). A question belongs to the held-out part by its own digest,
one in ten, so no question stands in both parts, whatever the seeds.
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

# Letters that are one token in runs/tiny, behind a blank as well as at the begin of a text.
LETTERS = "abcdefghklmnopstuvwy"
HELD_OUT = 1 << 32  # seeds from here on are those of held-out prompts in `t5x_like rl`


class Example(NamedTuple):
    """wrong: an answer that is not the right one, and looks like it."""

    task: str
    question: str
    answer: str
    wrong: str


def reverse(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 6)
    return f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))


def sort(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 6)
    return f"Sort: {' '.join(letters)}", " ".join(sorted(letters))


def repeat(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 3, 8)
    return f"Repeat: {' '.join(letters)}", " ".join(letters)


def count(chance: random.Random) -> tuple[str, str]:
    letters = [chance.choice("abcd") for _ in range(chance.randint(4, 8))]
    wanted = chance.choice("abcd")
    return f"Count {wanted}: {' '.join(letters)}", str(letters.count(wanted))


def add(chance: random.Random) -> tuple[str, str]:
    first, second = chance.randint(0, 50), chance.randint(0, 50)
    return f"Add {first} and {second}.", str(first + second)


def double(chance: random.Random) -> tuple[str, str]:
    letters = _letters(chance, 2, 4)
    return f"Double: {' '.join(letters)}", " ".join(letter for letter in letters for _ in range(2))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": reverse,
    "sort": sort,
    "repeat": repeat,
    "count": count,
    "add": add,
}
ASKED = ("reverse", "sort", "repeat")  # in GRPO: what the model sometimes does; sums and counts it only guesses
NEW_TASKS = {"double": double}  # what an adapter learns, and nothing else


def example(task: str, *, held_out: bool, seed: int, index: int) -> Example:
    chance = random.Random(f"{task}/{held_out}/{seed}/{index}")
    while True:
        question, answer = (TASKS | NEW_TASKS)[task](chance)
        if is_held_out(question) == held_out:
            return Example(task, question, answer, corrupted(answer, chance))


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] < 26


def corrupted(answer: str, chance: random.Random) -> str:
    """Another answer: a number a little too large or small; letters with two swapped, one replaced, or one lost."""
    if answer.isdigit():
        return str(chance.choice([n for n in range(int(answer) - 3, int(answer) + 4) if n >= 0 and n != int(answer)]))
    while True:
        letters = answer.split(" ")
        place, other = chance.randrange(len(letters)), chance.randrange(len(letters))
        kind = chance.choice(("swap", "replace", "lose"))
        if kind == "swap":
            letters[place], letters[other] = letters[other], letters[place]
        elif kind == "replace":
            letters[place] = chance.choice(LETTERS)
        else:
            del letters[place]
        if (wrong := " ".join(letters)) != answer:
            return wrong


def prompt(question: str) -> str:
    """As the chat template "plain" writes a question."""
    return f"User:\n{question}\n\nAssistant:\n"


def ask(seed: int, index: int) -> tuple[str, str]:
    """(prompt, expected answer), as `config.rl.generate`: the tasks of ASKED in turns."""
    found = example(ASKED[index % len(ASKED)], held_out=seed >= HELD_OUT, seed=seed, index=index)
    return prompt(found.question), found.answer


def share(asked: str, answer: str, expected: str) -> float:
    """How much of the answer stands in its place: it tells wrong answers apart."""
    del asked
    given, wanted = answer.split(" "), expected.split(" ")
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / max(len(given), len(wanted))


def _letters(chance: random.Random, least: int, most: int) -> list[str]:
    return [chance.choice(LETTERS) for _ in range(chance.randint(least, most))]
