"""A conversion beside an independent reader: logits of our model and of transformers on the same tokens."""

import numpy as np

from t5x_like.core.errors import UserError

ROWS, LENGTH = 2, 160
LIMIT = 2e-5  # of float32 logits of order 1 to 10; a wrong rotation or norm gives 1e-2 and more


def tokens(vocab_size: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(random ids, lengths of the rows): long rows, since a wrong position shows late, and one that ends earlier."""
    length = min(LENGTH, max_length)
    ids = np.random.default_rng(0).integers(0, vocab_size, (ROWS, length), dtype=np.int64)
    return ids, np.array([length, max(1, length * 5 // 8)])


def their_logits(folder: str, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Float32 logits of a Hugging Face folder by transformers, rows padded on the right by a mask."""
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError("--verify needs torch and transformers: pip install torch transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    mask = np.arange(ids.shape[1])[None, :] < lengths[:, None]
    with torch.no_grad():
        result = model.eval()(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    return result.logits.float().numpy()


def difference(ours: np.ndarray, theirs: np.ndarray, lengths: np.ndarray) -> float:
    """The largest difference of two logits on tokens that are no padding."""
    kept = np.arange(ours.shape[1])[None, :] < lengths[:, None]
    return float(np.abs(ours.astype(np.float64) - theirs)[kept].max())
