"""The files of a lifecycle: what its models learn from, and what they are measured with.

python -m configs.lifecycle.data runs/lifecycle/data
"""

import json
import pathlib
import sys
from collections.abc import Iterator

from t5x_like.configs import common
from t5x_like.configs.lifecycle.tasks import NEW_TASKS, TASKS, Example, example, is_held_out, prompt

TEXTS, TEXT_BYTES = 40, 900  # of the plays; a text fits the window of the model
EXAMPLES, PAIRS = 4000, 800  # of each task, for training
HELD_OUT_EXAMPLES, HELD_OUT_PAIRS = 100, 60  # of each task


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
