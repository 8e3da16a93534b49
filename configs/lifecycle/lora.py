"""LoRA: the instructed model learns one more task in an adapter of rank 8; the model itself stays as it is.

    t5x_like train --config=configs/lifecycle/lora.py:llama,runs/lifecycle --workdir=runs/lifecycle/lora
One of the stages of configs/lifecycle/tiny.py, which says what it costs and gains.
"""

from ml_collections import ConfigDict

from t5x_like.configs.lifecycle import instruct, models


def get_config(given: str = "llama,runs/lifecycle") -> ConfigDict:
    """`given`: the kind of model, and the folder of the lifecycle, with `data` and `instruct` in it."""
    kind, folder = models.given(given)
    config = instruct.get_config(given)
    config.checkpoint.update({"init_from": f"{folder}/instruct", "holds": "trained"})
    config.adapter.name = "lora"
    # Without the old tasks beside the new one the adapter answers every question as if it were the new one.
    sources = {"new": f"jsonl:{folder}/data/new_examples.jsonl", "old": f"jsonl:{folder}/data/examples.jsonl"}
    config.data.mixture.rates = {"new": 0.3, "old": 0.7}
    if not kind.chat:
        # Without conversations the adapter of a T5 forgets them; a decoder's hardly does (docs/log.md).
        sources["people"] = f"jsonl:{folder}/data/people.jsonl"
        config.data.mixture.rates = {"new": 0.3, "old": 0.6, "people": 0.1}
    config.data.mixture.sources = sources
    config.data.batch_size = 4
    config.data.tokenizer = f"{folder}/instruct/tokenizer"
    config.optim.update({"name": "adamw", "learning_rate": 5e-3 if kind.chat else 2e-3, "weight_decay": 0.0})
    config.loop.steps = 80
    return config
