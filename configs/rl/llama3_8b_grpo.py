"""GRPO of Llama 3.1 8B on 64 TPU v5p chips, FSDP: questions with a number for an answer, 64 x 16 answers an iteration.

    t5x_like plan --config=configs/rl/llama3_8b_grpo.py --topology=v5p:4x4x4
    t5x_like rl --config=configs/rl/llama3_8b_grpo.py --workdir=gs://BUCKET/llama3_8b_grpo \\
        --config.checkpoint.init_from=MODEL --config.roles.reference.source=MODEL --config.data.tokenizer=MODEL \\
        --config.data.source=jsonl:gs://BUCKET/questions.jsonl
Hardware: v5p-128 (64 chips). MODEL follows instructions already (configs/instruct/llama3_8b_chat.py). Records have
`inputs`, the question, and `targets`, the number. The model, its mesh and its kernels are those of
configs/pretrain/llama3_8b.py; the reference is held in bfloat16.
"""

from ml_collections import ConfigDict

from t5x_like.configs import common
from t5x_like.configs.pretrain import llama3_8b


def get_config() -> ConfigDict:
    config, base = common.rl_config(), llama3_8b.get_config()
    config.model, config.mesh, config.runtime = base.model, base.mesh, base.runtime
    config.model.update({"size": "3_1_8b", "remat": "full"})
    config.checkpoint.init_from = "REPLACE/llama3_8b_chat"
    config.roles.reference = {"source": "REPLACE/llama3_8b_chat", "rules": "", "dtype": "bfloat16"}
    config.data.update({"source": "jsonl:REPLACE/questions.jsonl", "tokenizer": "REPLACE/llama3_8b_chat"})
    # A row of 2048 holds a prompt of 1024 tokens, eight tiles of the attention kernel, and an answer, whose last token
    # is read by nothing.
    config.data.update({"batch_size": 256, "length": 2048})
    config.rl.update({"prompts": 64, "samples": 16, "new_tokens": 1025, "end_tokens": ("<|eot_id|>",)})
    config.rl.answers_per_row = 4  # 64 rows an update, one a chip
    config.rl.rewards.number = common.reward("number")
    config.objective.grpo.update({"kl_coefficient": 0.001, "reference": "role"})
    config.optim.update({"name": "adamw", "learning_rate": 1e-6, "weight_decay": 0.0})
    config.optim.schedule.update({"name": "constant", "warmup_steps": 20})
    config.loop.update({"steps": 2000, "log_every_steps": 4})
    config.checkpoint.every_steps = 100
    return config
