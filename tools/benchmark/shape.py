"""The shape of the benchmarks: a Llama of about 30M parameters, as a config of ours and as one of transformers."""

from typing import Any

from tools.benchmark import timing

SHAPE = {"width": 512, "layers": 8, "heads": 8, "mlp": 1376, "vocab": 8192, "rows": 8, "length": 512}


def config(*, tied: bool = False) -> Any:
    """Layers one by one rather than scanned: on a CPU that spares copies into stacked arrays (docs/log.md)."""
    from configs import common

    config = common.config()
    config.model.update({"family": "llama", "size": "mini", "vocab_size": SHAPE["vocab"], "scan": False})
    config.model.update({"width": SHAPE["width"], "max_length": SHAPE["length"]})
    config.model.head.tied = tied
    heads = {"heads": SHAPE["heads"], "kv_heads": SHAPE["heads"], "head_size": SHAPE["width"] // SHAPE["heads"]}
    config.model.decoder.update({"layers": SHAPE["layers"], "mlp": SHAPE["mlp"], **heads})
    config.data.update({"batch_size": SHAPE["rows"], "length": SHAPE["length"], "attend_across_documents": True})
    return config


def transformers_model(*, tied: bool = False) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(timing.THREADS)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE["width"],
            num_hidden_layers=SHAPE["layers"],
            num_attention_heads=SHAPE["heads"],
            intermediate_size=SHAPE["mlp"],
            vocab_size=SHAPE["vocab"],
            max_position_embeddings=SHAPE["length"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            attn_implementation="sdpa",
        )
    )
