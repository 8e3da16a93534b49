"""Of the data (t5x_like/data/config.py)."""

from ml_collections.config_dict import placeholder


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
            "messages": "",
        },
        "chat": {"template": "none", "train_on": "assistant", "system": ""},
        "answers": "joined",
        "csv_separator": "",
        "on_bad_record": "stop",
        "max_bad_share": 0.01,
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
        "truncate": {"rule": "cut", "inputs": "left", "min_targets": 0},
        "attend_across_documents": False,
        "prefix": False,
        "prefetch": 2,
        "workers": 0,
        "cache": "",
        "verify": False,
    }
