"""Small tasks of all four output types, and the models that answer them here and in transformers."""

import json
import pathlib
import shutil

import torch
import transformers

from t5x_like.evaluation import chat
from t5x_like.evaluation.harness import Settings
from t5x_like.evaluation.model import EvaluatedModel
from t5x_like.language_model import load
from tests.convert import folders

STORIES = folders.STORIES
SETTINGS = Settings(limit=None, shots=None, generation="", chat=False, batch_tokens=1024, seed=1234)

_WORDS = (
    "Once upon a time there was a little girl named Lily She loved to play outside in the park with her dog".split()
)


def _texts(count, words):
    return [
        " ".join(_WORDS[(start * 7 + i * (1 + start % 3)) % len(_WORDS)] for i in range(words))
        for start in range(count)
    ]


_QUESTIONS = [
    {"q": text, "choices": [text.split()[0], text.split()[3] + " ran", "the big red ball."], "answer": index % 3}
    for index, text in enumerate(_texts(12, 9))
]
RECORDS = {
    "choice": [*_QUESTIONS, {"q": "x " * 400, "choices": ["a dog", "a cat", "b"], "answer": 1}],
    "word": [{"q": text, "word": word} for text, word in zip(_texts(10, 6), _WORDS[5:], strict=False)],
    "page": [
        {"text": text} for text in [*_texts(4, 30), "caf\u00e9 and two  spaces\n\nnew line", " ".join(_texts(9, 60))]
    ],
    "story": [{"q": text, "a": "was"} for text in _texts(6, 8)],
}
_COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {file}}}\ntest_split: test\ntask: {name}\n"
_TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{q}} "
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}, {metric: brier_score}]
""",
    "word": """output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: word
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "page": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "story": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: a
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 48}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def write_tasks(folder: pathlib.Path) -> None:
    """Files of tasks `choice`, `word`, `page` and `story` with their records beside them."""
    for name, records in RECORDS.items():
        write_task(folder, name, records)


def write_task(folder: pathlib.Path, name: str, records: list[dict]) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / f"{name}.yaml").write_text(_COMMON.format(file=file, name=name) + _TASKS[name])


def write_model(name: str, folder: pathlib.Path) -> None:
    """A folder of transformers: a decoder with the tokenizer of stories260K, or a T5 that reads bytes."""
    if name == "stories":
        shutil.copytree(STORIES, folder, dirs_exist_ok=True)
    elif name == "t5":
        _write_t5(folder)
        return
    else:
        folders.save(name, folder)
    # Both sides read tokenizer.json as it is: transformers' LlamaTokenizer would treat leading spaces in its own way.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_t5(folder: pathlib.Path) -> None:
    """As many layers in both stacks, without which transformers does not generate; its answers are ASCII."""
    config = transformers.T5Config(**folders.T5 | {"vocab_size": 259, "num_decoder_layers": 2})
    model = folders.randomized(transformers.T5ForConditionalGeneration(config))
    with torch.no_grad():
        model.shared.weight[3 + 128 :] = 0
    model.save_pretrained(folder)
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0, "pad_token": "<pad>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def ours(folder: pathlib.Path, *, name: str = "ours", mesh=None, template: bool = False) -> EvaluatedModel:
    loaded = load(str(folder), mesh=mesh)
    asked = chat.Requests(loaded.template) if template else None
    return EvaluatedModel.of(
        name, loaded.model, loaded.params, loaded.vocabulary, start_id=loaded.start_id, mesh=mesh, chat=asked
    )


def theirs(folder: pathlib.Path, *, max_length: int, bos: bool | None = None):
    """The harness's own backend on the same files."""
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=max_length, add_bos_token=bos
    )
