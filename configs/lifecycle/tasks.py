"""The tasks of a lifecycle: short questions about letters and numbers, whose answers can be checked, and their files.

    python -m configs.lifecycle.tasks runs/lifecycle/data

An example is a pure function of (task, part, seed, index). A question belongs to the held-out part by its own digest,
one in ten, so no question stands in both parts, whatever the seeds.
"""

import hashlib
import json
import pathlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from t5x_like.configs import common

# Letters that are one token in runs/tiny, behind a blank as well as at the begin of a text.
LETTERS = "abcdefghklmnopstuvwy"
HELD_OUT = 1 << 32  # seeds from here on are those of held-out prompts in `t5x_like rl`
TEXTS, TEXT_BYTES = 40, 900  # of the plays; a text fits the window of the model
EXAMPLES, PAIRS = 4000, 800  # of each task, for training
HELD_OUT_EXAMPLES, HELD_OUT_PAIRS = 100, 60  # of each task


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
    """(prompt, expected answer), as `config.rl.generate`: the tasks in turns."""
    names = list(TASKS)
    found = example(names[index % len(names)], held_out=seed >= HELD_OUT, seed=seed, index=index)
    return prompt(found.question), found.answer


def share(asked: str, answer: str, expected: str) -> float:
    """How much of the answer stands in its place: it tells wrong answers apart."""
    del asked
    given, wanted = answer.split(" "), expected.split(" ")
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / max(len(given), len(wanted))


def write(folder: str) -> None:
    """All files of a lifecycle: examples and pairs for training, questions, pairs and texts to measure with."""
    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    conversations = [*_conversations()]
    held = [each for each in conversations if is_held_out(each[0]["content"])]
    for name, records in {
        "examples": [_turns(each) for each in _examples(TASKS, EXAMPLES)],
        "new_examples": [_turns(each) for each in _examples(NEW_TASKS, EXAMPLES)],
        "conversations": [{"messages": each} for each in conversations if each not in held],
        "pairs": [_pair(each) for each in _examples(TASKS, PAIRS)],
        "pairs_held_out": [_pair(each) for each in _examples(TASKS, HELD_OUT_PAIRS, held_out=True)],
        "conversations_held_out": [{"text": _rendered(each)[:TEXT_BYTES]} for each in held],
        "plays_held_out": [{"text": each} for each in _plays()],
        "held_out": [_asked(each) for each in _examples(TASKS | NEW_TASKS, HELD_OUT_EXAMPLES, held_out=True)],
    }.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        _write(out / f"{name}.jsonl", lines.encode())


def _examples(tasks: dict, number: int, *, held_out: bool = False) -> Iterator[Example]:
    """The tasks in turns; among held-out ones no question twice."""
    seen: set[str] = set()
    for task in [*tasks] if held_out else [""]:
        index = found = 0
        while found < number * (1 if held_out else len(tasks)):
            name = task or [*tasks][index % len(tasks)]
            each = example(name, held_out=held_out, seed=0, index=index)
            index += 1
            if not (held_out and each.question in seen):
                seen.add(each.question)
                found += 1
                yield each


def _letters(chance: random.Random, least: int, most: int) -> list[str]:
    return [chance.choice(LETTERS) for _ in range(chance.randint(least, most))]


def _turns(each: Example) -> dict:
    return {"messages": [{"role": "user", "content": each.question}, {"role": "assistant", "content": each.answer}]}


def _pair(each: Example) -> dict:
    return {"prompt": prompt(each.question), "chosen": each.answer, "rejected": each.wrong}


def _asked(each: Example) -> dict:
    return {"task": each.task, "prompt": prompt(each.question), "answer": each.answer, "wrong": each.wrong}


def _conversations() -> Iterator[list[dict]]:
    for name in ("self_instruct", "oasst"):
        for line in pathlib.Path(common.bundled(f"instructions/{name}.jsonl")).read_text("utf-8").splitlines():
            yield json.loads(line)["messages"]


def _plays() -> Iterator[str]:
    """Pieces of the last tenth of the plays, which configs/pretrain/tiny.py holds out, spread over it."""
    whole = pathlib.Path(common.bundled("tinyshakespeare/input.txt")).read_text("ascii")
    first = len(whole) - len(whole) // 10 + TEXT_BYTES  # clear of where the training part ends
    apart = (len(whole) - first) // TEXTS
    for begin in range(first, first + TEXTS * apart, apart):
        yield whole[begin : begin + TEXT_BYTES]


def _rendered(messages: list[dict]) -> str:
    return "".join(f"{each['role'].capitalize()}:\n{each['content']}\n\n" for each in messages)


def _write(path: pathlib.Path, content: bytes) -> None:
    """Through a temporary name: what is there is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.rename(path)


if __name__ == "__main__":
    write(sys.argv[1])
