"""Instruction tuning of Llama 3.1 8B on 64 TPU v5p chips, FSDP: all parameters, conversations packed into rows of 4096.

    t5x_like plan --config=configs/instruct/llama3_8b_chat.py --topology=v5p:4x4x4
    t5x_like train --config=configs/instruct/llama3_8b_chat.py --workdir=gs://BUCKET/llama3_8b_chat \\
        --config.checkpoint.init_from=MODEL --config.data.tokenizer=MODEL \\
        --config.data.source=jsonl:gs://BUCKET/conversations/*.jsonl
Hardware: v5p-128 (64 chips). Global batch 256 x 4096 tokens as configs/pretrain/llama3_8b.py, full remat. MODEL is a
Hugging Face folder or one of ours. Whole conversations, each of which sees itself alone; loss on what the assistant
says.
"""

from ml_collections import ConfigDict

from t5x_like.configs.pretrain import llama3_8b


def get_config() -> ConfigDict:
    config = llama3_8b.get_config()
    config.model.update({"size": "3_1_8b", "remat": "full"})
    config.checkpoint.init_from = "REPLACE/Llama-3.1-8B"
    config.data.tokenizer = "REPLACE/Llama-3.1-8B"
    config.data.fields.messages = "messages"
    config.data.chat.update({"template": "llama3", "train_on": "assistant"})
    config.data.update({"packing": "examples", "attend_across_documents": False, "validation": "0.01"})
    config.optim.update({"learning_rate": 1e-5, "weight_decay": 0.0})
    config.optim.schedule.warmup_steps = 50
    config.loop.update({"steps": 1000, "on_spike": "off"})
    config.evaluate.every_steps = 100
    config.checkpoint.every_steps = 200
    return config
