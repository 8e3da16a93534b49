"""DPO of the model of configs/pretrain/tiny.py by an adapter, on 1,156 pairs of dialogues that people judged.

    make train
    t5x_like train --config=configs/preference/dpo.py --workdir=runs/dpo
Hardware: 2 CPU cores, under 2 minutes; each step reads every pair with the policy and with its base. Expected: 0.61 of
371 held-out pairs in the right order beside the reference, 4.3 standard errors above a coin (docs/log.md). The settings
were chosen on other pairs.

The pairs are those of configs/preference/reward.py. The reference is the policy without its adapter, so that no second
model is held.
"""

from ml_collections import ConfigDict

from t5x_like.configs.preference import reward


def get_config(base: str = "runs/tiny") -> ConfigDict:
    """`base`: the workdir of a run of configs/pretrain/tiny.py."""
    config = reward.get_config(base)
    config.model.scalar_heads = ()
    config.objective.name = "dpo"
    config.objective.dpo.update({"reference": "base", "beta": 0.1})
    config.data.features = "pairs"
    config.adapter.name = "lora"
    config.adapter.lora.update({"rank": 8, "alpha": 16.0})
    config.checkpoint.holds = "trained"
    config.optim.update({"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.0})
    config.loop.steps = 100
    config.checkpoint.every_steps = 100
    return config
