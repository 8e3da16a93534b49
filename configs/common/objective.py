"""Of the objective, every variant (t5x_like/objectives/table.py)."""


def objective() -> dict:
    return {
        "name": "lm",
        "lm": {"z_loss": 0.0, "label_smoothing": 0.0},
        "distill": {"divergence": "forward_kl", "temperature": 2.0, "weight": 0.5},
        "grpo": {
            "clip_low": 0.2,
            "clip_high": 0.2,
            "kl_coefficient": 0.0,
            "reference": "none",
            "aggregation": "token",
            "constant": 0,
            "temperature": 1.0,
        },
        "reward": {"centering": 0.0},
        "dpo": {"beta": 0.1, "label_smoothing": 0.0, "length_normalized": False, "reference": "role"},
    }
