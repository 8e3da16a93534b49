"""A model directory ready to use from Python: logits, generation, log-likelihoods. No training, no server.

lm = t5x_like.load("runs/tiny")
lm.generate(["To be, or"], max_new_tokens=40, temperature=0.8, seed=1)
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like import experiment as experiments
from t5x_like.convert.convert import load_params
from t5x_like.convert.foreign import is_foreign, open_foreign
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import Tree
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.inference import decode
from t5x_like.inference.sampling import Sampling
from t5x_like.layers.scoring.head import Head, logits
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.storage import model_directory, paths
from t5x_like.storage.reading import restore


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Functions of a model, its parameters and its vocabulary. Made by `t5x_like.load`."""

    model: Model
    params: Tree
    vocabulary: Vocabulary

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Float32 logits [B, T, V] for rows of tokens, V without padding of the vocabulary."""
        tokens_BT = np.asarray(tokens_BT)
        if tokens_BT.ndim != 2 or tokens_BT.size == 0:
            raise UsageError(f"logits: tokens of shape {tokens_BT.shape}, expected [rows, length]")
        self._check_tokens(tokens_BT)
        return np.asarray(_logits(self.model, self.params, jnp.asarray(tokens_BT, jnp.int32)))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """The text that follows each prompt, up to the end of the document; temperature 0 is greedy."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens} should be at least 1")
        if not prompts:
            return []
        tokens = [self._encode(prompt) for prompt in prompts]
        self._check_length(max(map(len, tokens)) + max_new_tokens)
        new = decode.generate(
            self.model,
            self.params,
            tokens,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            stop_id=self.vocabulary.eos_id,
        )
        return [self._continuation(prompt, row) for prompt, row in zip(tokens, new, strict=True)]

    def log_likelihood(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """(natural log-probability of each continuation after its context, whether it is the greedy one)."""
        if isinstance(contexts, str) or isinstance(continuations, str):
            raise UsageError("log_likelihood takes lists of texts: log_likelihood([context], [continuation])")
        if len(contexts) != len(continuations):
            raise UsageError(f"log_likelihood: {len(contexts)} contexts but {len(continuations)} continuations")
        pairs = [self._encode_pair(*pair) for pair in zip(contexts, continuations, strict=True)]
        if not pairs:
            return []
        width = decode.row_length(self.model, max(len(tokens) for tokens, _ in pairs))
        self._check_length(max(len(tokens) for tokens, _ in pairs))
        tokens = np.zeros((len(pairs), width + 1), np.int32)
        scored = np.zeros((len(pairs), width), bool)
        for row, (ids, start) in enumerate(pairs):
            tokens[row, : len(ids)] = ids
            scored[row, start - 1 : max(len(ids) - 1, 0)] = True
        logp, greedy = _score(self.model, self.params, jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
        sums = np.where(scored, np.asarray(logp, np.float64), 0).sum(axis=1)
        matches = np.all(np.asarray(greedy) | ~scored, axis=1).tolist()
        return [(float(total), bool(match)) for total, match in zip(sums, matches, strict=True)]

    def _encode(self, text: str) -> list[int]:
        """Tokens of a prompt: begins as a document does; an empty prompt starts after the end of the last one."""
        _check_text(text)
        tokens = self.vocabulary.encode(text, bos=True)
        if tokens or self.vocabulary.eos_id is None:
            return tokens
        return [self.vocabulary.eos_id]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """(tokens of both, index of the first continuation token).

        White space at the end of the context belongs to the continuation, since tokens often begin with it. Without a
        context all of it is scored, after what begins a document; with no such token its first cannot be.
        """
        stripped = context.rstrip()
        if not stripped:
            begin = self._encode("")
            _check_text(continuation)
            return begin + self.vocabulary.encode(context + continuation), max(len(begin), 1)
        whole = self._encode(context + continuation)
        return whole, max(1, min(len(self._encode(stripped)), len(whole)))

    def _continuation(self, prompt: list[int], new: list[int]) -> str:
        """The text that the new tokens add: decoded together with the prompt, since a character may span both."""
        return self.vocabulary.decode(prompt + new)[len(self.vocabulary.decode(prompt)) :]

    def _check_tokens(self, tokens_BT: np.ndarray) -> None:
        if tokens_BT.min() < 0 or tokens_BT.max() >= self.vocabulary.size:
            found = f"{tokens_BT.min()} to {tokens_BT.max()}"
            raise UsageError(f"token ids should be from 0 to {self.vocabulary.size - 1}, found {found}")

    def _check_length(self, length: int) -> None:
        limit = self.model.config.max_length
        learned = any(stack.position == "learned" for stack in self.model.config.stacks.values())
        if learned and length > limit:
            raise UsageError(f"{length} tokens are more than the {limit} positions of this model; shorten the text")


def _check_text(text: str) -> None:
    """Bytes of the command line that are no UTF-8, and halves of surrogate pairs, have no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"text {text[:40]!r} is no UTF-8 at character {error.start}; give it as UTF-8") from None


def _apply(model: Model, params: Tree, tokens_BT: jax.Array) -> tuple[jax.Array, Head]:
    return model.score_input(params, model.apply(params, {"inputs": tokens_BT}))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Tree, tokens_BT: jax.Array) -> jax.Array:
    hidden_BTD, head = _apply(model, params, tokens_BT)
    return logits(hidden_BTD, head)[:, :, : head.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Tree, inputs_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden_BTD, head = _apply(model, params, inputs_BT)
    scores = token_scores(hidden_BTD, head, targets_BT, want=("logp", "best"))
    return scores.logp, scores.best == targets_BT


def load(directory: str | os.PathLike[str], *, step: int | None = None, ema: bool = False) -> LanguageModel:
    """The model of a workdir, model directory or Hugging Face folder, on the first device.

    Of a workdir from its newest checkpoint or that of `step`; `ema` takes the averaged parameters. Raises UserError
    where something is missing or damaged.
    """
    if is_foreign(os.fspath(directory)):
        if step is not None or ema:
            raise UsageError(f"{directory} is no workdir: it holds no steps and no averaged parameters")
        return _load_foreign(os.fspath(directory))
    place = model_directory.locate(os.fspath(directory), step=step)
    metadata = model_directory.read_metadata(place.checkpoint)
    # Of the config only the model's section: what trained it may have had other fields, or none.
    config = model_config.resolve(metadata["config"]["model"])
    if not paths.exists(place.tokenizer):
        raise UserError(f"{directory} holds no tokenizer; copy the folder {place.tokenizer} from where it came from")
    with paths.local_copy(place.tokenizer) as folder:
        vocabulary = vocabularies.load(folder)
    # A converted model may have had its tokenizer put beside it later: then there is nothing to compare with.
    recorded = metadata.get("provenance", {}).get("tokenizer", vocabulary.fingerprint)
    if vocabulary.fingerprint != recorded:
        raise UserError(
            f"{place.tokenizer} is not the tokenizer that {place.checkpoint} was trained with; restore that folder"
        )
    model = experiments.build_model(config, rules="", platform=jax.local_devices()[0].platform)
    item = "ema" if ema else "params"
    template = tree.map_with_path(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), model.specs())
    return LanguageModel(model, restore(place.checkpoint, {item: template})[item], vocabulary)


def _load_foreign(directory: str) -> LanguageModel:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with open_foreign(directory) as foreign:
        if not foreign.tokenizer:
            raise UserError(f"{directory} holds no tokenizer; copy its tokenizer.json there")
        vocabulary = vocabularies.load(os.path.dirname(foreign.tokenizer[0]))
        config, params = load_params(foreign, place=lambda path: device)
    model = experiments.build_model(config, rules="", platform=jax.local_devices()[0].platform)
    return LanguageModel(model, params, vocabulary)
