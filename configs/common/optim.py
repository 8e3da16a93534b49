"""Of the optimizer, every variant (t5x_like/optim/config.py)."""

from ml_collections.config_dict import placeholder


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
