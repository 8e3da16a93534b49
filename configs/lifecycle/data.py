"""The files of a lifecycle: what its models learn from, and what they are measured with.

python -m configs.lifecycle.data llama,runs/lifecycle
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from t5x_like.configs import common
from t5x_like.configs.lifecycle import models
from t5x_like.configs.lifecycle.models import Kind
from t5x_like.configs.lifecycle.tasks import Example, demonstrated, example, is_held_out

TEXTS, BEFORE, AFTER = 60, 250, 400  # of the plays, in bytes: both fit the window of a model
ANSWER_BYTES = 300  # of a person
EXAMPLES = 4000  # of each task, for training
HELD_OUT = 100  # questions of each task


def write(kind: Kind, folder: str) -> None:
    """Examples for training, and questions and texts to measure with, as the models of this kind read them."""
    out = pathlib.Path(folder, "data")
    out.mkdir(parents=True, exist_ok=True)
    people = [*_conversations()]
    held = [each for each in people if is_held_out(each[0])]
    questions = examples(kind.all_tasks, HELD_OUT, held_out=True)
    lines(out / "examples.jsonl", _demonstrations(kind, kind.tasks))
    lines(out / "new_examples.jsonl", _demonstrations(kind, (kind.new,)))
    lines(out / "people.jsonl", (_learned(kind, *each) for each in people if each not in held))
    lines(out / "held_out.jsonl", (asked(kind, each) for each in questions))
    lines(out / "people_held_out.jsonl", (_text(kind.asked.format(question), answer) for question, answer in held))
    lines(out / "plays_held_out.jsonl", (_play(kind, each) for each in _plays()))


def examples(tasks: Iterable[str], number: int, *, held_out: bool = False, seed: int = 0) -> list[Example]:
    """`number` of each task, the tasks in turns; among held-out ones no question twice."""
    found: dict[str, list[Example]] = {task: [] for task in tasks}
    for task, mine in found.items():
        seen: set[str] = set()
        index = 0
        while len(mine) < number:
            each = example(task, held_out=held_out, seed=seed, index=index)
            index += 1
            if not (held_out and each.question in seen):
                seen.add(each.question)
                mine.append(each)
    return [each for turn in zip(*found.values(), strict=True) for each in turn]


def asked(kind: Kind, each: Example) -> dict:
    return {"task": each.task, "prompt": kind.asked.format(each.question), "answer": each.answer}


def lines(path: pathlib.Path, records: Iterable[dict]) -> None:
    """Through a temporary name: what is there is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    temporary.rename(path)


def _demonstrations(kind: Kind, tasks: Sequence[str]) -> Iterator[dict]:
    for number, each in enumerate(examples(tasks, EXAMPLES)):
        yield _learned(kind, each.question, demonstrated(kind, each, number // len(tasks)))


def _learned(kind: Kind, question: str, answer: str) -> dict:
    if not kind.chat:
        return {"inputs": kind.asked.format(question), "targets": answer}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _text(before: str, after: str) -> dict:
    """bytes: of what is measured, without sentinels."""
    return {"prompt": before, "answer": after, "bytes": len(after.encode())}


def _conversations() -> Iterator[tuple[str, str]]:
    """The first question and answer of each, where both are short."""
    for name in ("self_instruct", "oasst"):
        for line in pathlib.Path(common.bundled(f"instructions/{name}.jsonl")).read_text("utf-8").splitlines():
            question, answer = (each["content"] for each in json.loads(line)["messages"][:2])
            if len(question.encode()) <= BEFORE:
                yield question, answer.encode()[:ANSWER_BYTES].decode(errors="ignore").rstrip()


def _plays() -> Iterator[str]:
    """Pieces of the last tenth of the plays, which pretraining holds out, spread over it."""
    whole = pathlib.Path(common.bundled("tinyshakespeare/input.txt")).read_text("ascii")
    size = BEFORE + AFTER
    first = len(whole) - len(whole) // 10 + size  # clear of where the training part ends
    apart = (len(whole) - first) // TEXTS
    for begin in range(first, first + TEXTS * apart, apart):
        yield whole[begin : begin + size]


def _play(kind: Kind, text: str) -> dict:
    """What follows a begin; of an encoder-decoder the words that were cut out, three of every fifteen."""
    if kind == models.LLAMA:
        return _text(text[:BEFORE].rstrip(), text[len(text[:BEFORE].rstrip()) :])
    words = text[:BEFORE].split(" ")
    before, after, size = [], [], 0
    for number, begin in enumerate(range(0, len(words), 15)):
        gap = " ".join(words[begin + 6 : begin + 9])
        before += [*words[begin : begin + 6], f"<extra_id_{number}>", *words[begin + 9 : begin + 15]]
        after += [f"<extra_id_{number}>", gap]
        size += len(gap.encode()) + 1
    return {"prompt": " ".join(before), "answer": " ".join(after), "bytes": size}


if __name__ == "__main__":
    write(*models.given(sys.argv[1]))
