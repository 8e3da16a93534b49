"""A step of instruction tuning on packed conversations, the 30M Llama: ours beside TRL's SFTTrainer.

Both get one batch: conversations packed into the rows, positions that begin anew with each, and the loss on the
assistant's tokens. Theirs is the trainer's own loss, which scores labelled tokens alone, without a mask: transformers
finds the conversations of a row by their positions.
"""

from typing import Any

from tools.benchmark import timing, train_step
from tools.benchmark.shape import SHAPE, config, transformers_model
from tools.benchmark.timing import THREADS, Values


def measure(rounds: int, steps: int) -> None:
    ours, theirs = "sft_step:ours", "sft_step:trl"
    results = timing.in_turns([ours, theirs], {"steps": steps}, rounds=rounds)
    arrays = _arrays()
    share = arrays["loss_weights"].mean()
    each = f"{int(arrays['segment_ids'].max(axis=1).sum())} conversations a batch, loss on {share:.0%} of the tokens"
    print(f"\ninstruction tuning, {SHAPE}, {each}, {THREADS} threads; median of {rounds} rounds of {steps} steps")
    print(timing.machine("torch", "transformers", "trl"))
    for name, label in {ours: "ours, fp32", theirs: "TRL, fp32"}.items():
        print(
            f"  {label:<28}{timing.median(results[name]):6.3f} s/step  {timing.ratio(results[theirs], results[name])} "
            f"TRL  loss {results[name][-1]['loss']:.4f}"
        )


def _arrays() -> dict[str, Any]:
    """Conversations of 60 to 250 tokens, two turns each, of which the assistant says the second and the fourth part."""
    import numpy as np

    draw, rows, length = np.random.default_rng(0), SHAPE["rows"], SHAPE["length"]
    tokens = draw.integers(2, SHAPE["vocab"], (rows, length + 1)).astype(np.int32)
    positions, segments = (np.zeros((rows, length), np.int32) for _ in range(2))
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        begin = number = 0
        while begin < length:
            size = min(int(draw.integers(60, 250)), length - begin)
            number += 1
            positions[row, begin : begin + size] = np.arange(size)
            segments[row, begin : begin + size] = number
            inside = np.arange(size - 1)  # what the last token predicts belongs to another one
            weights[row, begin : begin + size - 1] = (inside * 4 // size) % 2
            begin += size
    names = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segment_ids": segments}
    return names | {"loss_weights": weights}


def _ours(values: Values) -> dict[str, Any]:
    chosen = config()
    chosen.data.update({"attend_across_documents": False, "packing": "examples"})
    return train_step.ours(chosen, _arrays(), values["steps"])


def _trl(values: Values) -> dict[str, Any]:
    import tempfile
    import warnings

    import datasets
    import torch
    import trl

    warnings.simplefilter("ignore")
    model, arrays = transformers_model(), _arrays()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[], max_length=None)
        rows = datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in arrays["inputs"]])
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=_tokenizer())
    labels = torch.full(arrays["inputs"].shape, -100)
    trained = torch.tensor(arrays["loss_weights"][:, :-1] > 0)
    labels[:, 1:][trained] = torch.tensor(arrays["targets"][:, :-1]).long()[trained]
    batch = {"input_ids": torch.tensor(arrays["inputs"]).long(), "labels": labels}
    batch["position_ids"] = torch.tensor(arrays["positions"]).long()
    return train_step.in_torch(model, lambda: trainer.compute_loss(model, dict(batch)), values["steps"])


def _tokenizer() -> Any:
    """The trainer wants one; it reads nothing here."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


WORKERS: dict[str, timing.Worker] = {"ours": _ours, "trl": _trl}
