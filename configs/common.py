"""Every field of a run with its usual value: the one place where defaults stand. A config starts from `config()`.

A field that is None is supplied later: those of `model` by family and size, those of `mesh` by the preset.
Units and meanings are documented at the dataclass that each section becomes (`ModelConfig`, `DataConfig`, ...).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "model": model(),
            "data": data(),
            "mesh": mesh(),
            "optim": optim(),
            "objective": objective(),
            "roles": {},  # name -> {"source": a model directory, "rules": "", "dtype": "stored"}
            "loop": loop(),
            "checkpoint": checkpoint(),
            "evaluate": {"every_steps": 0, "ema": False},
            "telemetry": telemetry(),
            "runtime": runtime(),
        }
    )


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
        "init": {"name": placeholder(str), "std": placeholder(float), "depth_scaled": placeholder(bool)},
        "dropout": 0.0,
        "scan": True,
        "remat": "none",
        "dtype": {"params": "float32", "compute": "auto"},
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
                "factor": placeholder(float),
                "low_frequency": placeholder(float),
                "high_frequency": placeholder(float),
                "original_length": placeholder(int),
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


def data() -> dict:
    return {
        "source": "",
        "mixture": {
            "sources": {},
            "rates": {},
            "maximum": placeholder(float),
            "scale": 1.0,
            "temperature": 1.0,
            "counts": "examples",
        },
        "fields": {
            "text": "text",
            "inputs": "",
            "targets": "",
            "prompt": "",
            "chosen": "",
            "rejected": "",
            "label": "",
        },
        "preprocessors": (),
        "tokenizer": "bytes",
        "extra_ids": 0,
        "tokenizer_training_bytes": 100_000_000,
        "validation": "",
        "validation_stride": 0,
        "validation_batches": 0,
        "batch_size": 8,
        "length": 256,
        "features": "causal",
        "encoder_length": 0,
        "start_token": "pad",
        "span_corruption": {"noise_density": 0.15, "mean_span_length": 3.0},
        "packing": "concatenate",
        "attend_across_documents": False,
        "prefetch": 2,
        "workers": 0,
        "cache": "",
        "verify": False,
    }


def mesh() -> dict:
    axes = ("slice", "stage", "data", "fsdp", "expert", "sequence", "tensor")
    return {"preset": "fsdp", "rules": ""} | {axis: placeholder(int) for axis in axes}


def optim() -> dict:
    adam = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
    return {
        "name": "adamw",
        "learning_rate": 3e-4,
        "schedule": {
            "name": "cosine",
            "steps": placeholder(int),  # None: loop.steps of the first start
            "warmup_steps": 100,
            "cosine": {"final_fraction": 0.1},
            "linear": {"final_fraction": 0.0},
            "rsqrt": {"timescale": placeholder(int)},
            "warmup_stable_decay": {"decay_fraction": 0.2, "final_fraction": 0.0, "shape": "sqrt"},
        },
        "clip_norm": 1.0,
        "weight_decay": 0.1,
        # Matrices decay; norms and biases do not.
        "decay": ((".*(norm|bias|scale).*", 0.0), (".*", 1.0)),
        "multiplier": ((".*", 1.0),),
        "freeze": ((".*", False),),
        "adamw": adam,
        "adafactor": {
            "decay_rate": 0.8,
            "eps": 1e-30,
            "clip_threshold": 1.0,
            "min_scale": placeholder(float),
            "momentum": placeholder(float),
            "min_dim_size_to_factor": 128,
        },
        "lion": {"b1": 0.9, "b2": 0.99},
        "muon": {
            "momentum": 0.95,
            "nesterov": True,
            "steps": 5,
            "scale": "rms",  # made for learning rates like AdamW's, as those here
            "rms": 0.2,
            "adam_multiplier": 1.0,
            "adam": adam,
        },
        "sgd": {"momentum": 0.9, "nesterov": False},
    }


def objective() -> dict:
    return {
        "name": "lm",
        "lm": {"z_loss": 0.0, "label_smoothing": 0.0},
        "distill": {"divergence": "forward_kl", "temperature": 2.0, "weight": 0.5},
    }


def loop() -> dict:
    return {
        "steps": 1000,
        "log_every_steps": 10,
        "micro_batches": 1,
        "ema_decay": placeholder(float),
        "on_nonfinite": "stop",
        "on_spike": "off",
        "spike_deviations": 6.0,
        "spike_memory": 0.99,
        "spike_warmup": 100,
    }


def telemetry() -> dict:
    return {
        "tensorboard": True,
        "plot": True,
        "plot_every_seconds": 60.0,
        "measure_cpu_peak": True,
        "profile": {"start_step": 10, "steps": 0},
    }


def checkpoint() -> dict:
    return {
        "every_steps": 1000,
        "asynchronous": True,
        "timeout_seconds": 1200,
        "keep_last": 2,
        "keep_every": placeholder(int),
        "best_metric": placeholder(str),
        "best_mode": "min",
        "keep_best": 1,
        "init_from": placeholder(str),
        "init_select": (".*",),
        "holds": "model",
    }


def runtime() -> dict:
    return {
        "platform": "",
        "threads": 0,
        "fake_devices": 0,
        "compiler_options": {
            # Matrix products by Eigen, which is faster than the default library here; see docs/log.md.
            "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
            "gpu": {},
            "tpu": {},
        },
        "heartbeat_seconds": 100,
        "shutdown_seconds": 300,
        "phase_seconds": {"start": 900.0, "compile": 3600.0, "step": 900.0, "evaluate": 3600.0, "save": 3600.0},
        "compilation_cache": "auto",
        "compilation_cache_bytes": 4 * 2**30,
    }
