"""Of the adapter (t5x_like/peft/config.py)."""


def adapter() -> dict:
    return {
        "name": "none",
        "lora": {
            "rank": 8,
            "alpha": 16.0,
            "rank_stabilized": False,
            "dropout": 0.0,
            "targets": (".*",),  # every matrix of the layers
            "ranks": (),
        },
    }
