"""A conversion beside an independent reader: logits of our model and of transformers on the same tokens."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.convert import convert
from t5x_like.convert.foreign import open_foreign
from t5x_like.core import tree
from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.errors import UserError
from t5x_like.core.types import Tree
from t5x_like.layers.scoring.head import logits
from t5x_like.models.config import ModelConfig
from t5x_like.models.model import Model
from t5x_like.parallel.rules import rules

ROWS, LENGTH = 2, 160
SHARE = 1e-5  # of the largest logit: two float32 models that are equal but for roundings of their weights
LIMIT = 2e-5  # of float32 logits of order 1 to 10; a wrong rotation or norm gives 1e-2 and more


def tokens(vocab_size: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(random ids, lengths of the rows): long rows, since a wrong position shows late, and one that ends earlier."""
    length = min(LENGTH, max_length)
    ids = np.random.default_rng(0).integers(0, vocab_size, (ROWS, length), dtype=np.int64)
    return ids, np.array([length, max(1, length * 5 // 8)])


def their_logits(folder: str, ids: np.ndarray, lengths: np.ndarray, sources: np.ndarray | None) -> np.ndarray:
    """Float32 logits of a Hugging Face folder by transformers, rows padded on the right by a mask.

    sources: what the encoder of an encoder-decoder reads.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError("--verify needs torch and transformers: pip install torch transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if sources is None else transformers.AutoModelForSeq2SeqLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    mask = torch.from_numpy((np.arange(ids.shape[1])[None, :] < lengths[:, None]).astype(np.int64))
    with torch.no_grad():
        if sources is None:
            result = model(input_ids=torch.from_numpy(ids), attention_mask=mask)
        else:
            result = model(
                input_ids=torch.from_numpy(sources),
                decoder_input_ids=torch.from_numpy(ids),
                decoder_attention_mask=mask,
            )
    return result.logits.float().numpy()


def difference(ours: np.ndarray, theirs: np.ndarray, lengths: np.ndarray) -> float:
    """The largest difference of two logits on tokens that are no padding."""
    kept = np.arange(ours.shape[1])[None, :] < lengths[:, None]
    return float(np.abs(ours.astype(np.float64) - theirs)[kept].max())


def our_logits(model: Model, params: Tree, ids: np.ndarray, sources: np.ndarray | None) -> np.ndarray:
    """Float32 logits of our model, without the padding of its vocabulary."""
    batch = {"inputs": jnp.asarray(ids, jnp.int32)}
    if sources is not None:
        batch["encoder_inputs"] = jnp.asarray(sources, jnp.int32)

    @jax.jit
    def run(params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        hidden_BTD, head = model.score_input(params, model.apply(params, batch))
        return logits(hidden_BTD, head)[:, :, : head.vocab_size]

    return np.asarray(run(params, batch))


def between(one: Tree, other: Tree, model: Model) -> float:
    """The largest difference of logits of two trees of parameters of a model, as a share of the largest logit."""
    config = model.config
    ids, lengths = tokens(config.vocab_size, config.max_length)
    sources = None if config.encoder is None else ids[:, ::-1].copy()
    first, second = (our_logits(model, params, ids, sources) for params in (one, other))
    return difference(first, second, lengths) / float(np.abs(first).max())


def verify(folder: str) -> float:
    """The largest difference of logits, in float32, of a Hugging Face folder as we read it and as transformers does.

    Rows of 160 tokens or the longest that the model takes; the second one is padded on the right.
    """
    models: list[Model] = []

    def templates(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
        models.append(Model(config, rules(), DtypePolicy("float32", "float32")))
        return {path: jax.ShapeDtypeStruct(s.shape, "float32") for path, s in tree.leaves(models[0].specs())}

    with open_foreign(folder) as foreign:
        params = convert.load_params(foreign, templates)
    model = models[0]
    config = model.config
    ids, lengths = tokens(config.vocab_size, config.max_length)
    sources = None if config.encoder is None else ids[:, ::-1].copy()
    ours = our_logits(model, params, ids, sources)
    return difference(ours, their_logits(os.fspath(folder), ids, lengths, sources), lengths)
