"""Of a model: what family and size decide is None here (t5x_like/models/config.py)."""

from ml_collections.config_dict import placeholder


def model() -> dict:
    return {
        "family": "llama",
        "size": "tiny",
        "architecture": placeholder(str),
        "vocab_size": placeholder(int),
        "vocab_multiple": 128,
        "max_length": placeholder(int),
        "width": placeholder(int),
        "embedding": {
            "scale": placeholder(float),
            "norm": placeholder(bool),
            "types": placeholder(int),
            "offset": placeholder(int),
        },
        "encoder": stack(),
        "decoder": stack(),
        "head": {
            "tied": placeholder(bool),
            "scale": placeholder(float),
            "bias": placeholder(bool),
            "softcap": placeholder(float),
            "transform": placeholder(bool),
        },
        "scalar_heads": placeholder(tuple),
        "init": {"name": placeholder(str), "std": placeholder(float), "depth_scaled": placeholder(bool)},
        "dropout": 0.0,
        "scan": True,
        "remat": "none",
        "attention_block": 1024,
        "dtype": {"params": "float32", "compute": "auto", "products": "compute"},
    }


def stack() -> dict:
    return {
        "layers": placeholder(int),
        "heads": placeholder(int),
        "kv_heads": placeholder(int),
        "head_size": placeholder(int),
        "mlp": placeholder(int),
        "norm": placeholder(str),
        "norm_epsilon": placeholder(float),
        "norm_order": placeholder(str),
        "parallel": placeholder(bool),
        "position": placeholder(str),
        "rope": {
            "theta": placeholder(tuple),
            "scaling": {
                "name": placeholder(str),
                "linear": {"factor": placeholder(float)},
                "llama3": {
                    "factor": placeholder(float),
                    "low_frequency": placeholder(float),
                    "high_frequency": placeholder(float),
                    "original_length": placeholder(int),
                },
                "yarn": {
                    "factor": placeholder(float),
                    "original_length": placeholder(int),
                    "beta_fast": placeholder(float),
                    "beta_slow": placeholder(float),
                    "attention_factor": placeholder(float),
                },
            },
        },
        "relative": {"buckets": placeholder(int), "max_distance": placeholder(int)},
        "windows": placeholder(tuple),
        "activation": placeholder(str),
        "gated": placeholder(bool),
        "qkv_bias": placeholder(bool),
        "out_bias": placeholder(bool),
        "mlp_bias": placeholder(bool),
        "qk_norm": placeholder(bool),
        "attention_scale": placeholder(float),
        "attention_softcap": placeholder(float),
        "final_norm": placeholder(bool),
    }
