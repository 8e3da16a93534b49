"""A model directory ready to use from Python: logits, generation, log-likelihoods. No training, no server.

lm = t5x_like.load("runs/tiny")
lm.generate(["To be, or"], max_new_tokens=40, temperature=0.8, seed=1)
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5x_like.core.config import nearest
from t5x_like.core.environment import READING, spare_search
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import Tree
from t5x_like.data.templates.chat import Chat
from t5x_like.data.templates.messages import of_list
from t5x_like.data.tokenizers import sentinels
from t5x_like.inference import decode
from t5x_like.inference.sampling import Sampling
from t5x_like.inference.score import TOKENS_PER_BATCH, score
from t5x_like.inference.weights import for_decoding
from t5x_like.layers.scoring.head import logits
from t5x_like.models.model import Model
from t5x_like.runs import loading
from t5x_like.runs.loading import DTYPES, Loaded
from t5x_like.storage import patterns


@dataclasses.dataclass(frozen=True)
class LanguageModel(Loaded):
    """Functions of a model, its parameters and its vocabulary. Made by `t5x_like.load`."""

    @property
    def platform(self) -> str:
        """Of the devices that hold the parameters."""
        return next(iter(jax.tree.leaves(self.params)[0].devices())).platform

    @functools.cached_property
    def _for_decoding(self) -> tuple[Model, Tree]:
        return for_decoding(self.model, self.params)

    @property
    def has_encoder(self) -> bool:
        """Whether it reads a source and answers it, rather than continuing a text."""
        return "encoder_inputs" in self.model.inputs

    def logits(self, tokens_BT: np.ndarray, sources_BS: np.ndarray | None = None) -> np.ndarray:
        """Float32 logits [B, T, V] for rows of tokens, V without padding of the vocabulary. sources_BS: what the
        encoder of an encoder-decoder reads; its tokens begin with `start_id`."""
        if (sources_BS is not None) != self.has_encoder:
            raise UsageError("logits: a model with an encoder reads sources beside tokens, any other reads none")
        given = {"inputs": tokens_BT} | ({} if sources_BS is None else {"encoder_inputs": sources_BS})
        arrays = {name: np.asarray(array) for name, array in given.items()}
        for array in arrays.values():
            if array.ndim != 2 or array.size == 0:
                raise UsageError(f"logits: tokens of shape {array.shape}, expected [rows, length]")
            self._check_tokens(array)
        batch = {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}
        return np.asarray(_compiled(_logits, self.platform)(self.model, self.params, batch))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        prefix: str = "",
        beyond_max_length: bool = False,
    ) -> list[str]:
        """The text that follows each prompt, up to the end of the document; temperature 0 is greedy.

        An encoder-decoder reads each prompt as a source and answers it; the text is what follows `prefix`, with which
        every answer begins. In its texts <extra_id_0> and so on are sentinels, where the tokenizer has them.
        beyond_max_length: positions that are not learned may go on past the model's max_length, where nothing was
        trained.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens} should be at least 1")
        if not prompts:
            return []
        if prefix and not self.has_encoder:
            raise UsageError("prefix is for a model with an encoder; put what an answer begins with into the prompt")
        sources = [self._encode_source(prompt) for prompt in prompts] if self.has_encoder else None
        if sources is None:
            tokens = [self._encode(prompt) for prompt in prompts]
        else:
            tokens = [[self.start_id, *self._encode_answer(prefix)]] * len(prompts)
        if not all(sources or tokens):
            raise UsageError("an empty prompt needs a tokenizer with a token that begins or ends a document; give text")
        sampling, stops = Sampling(temperature, top_k, top_p), self.ends
        return self._continued(tokens, sources, stops, max_new_tokens, sampling, seed, beyond_max_length)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        beyond_max_length: bool = False,
    ) -> list[str]:
        """The assistant's answer to a conversation, or to each of several: lists of {"role": ..., "content": ...}.

        They are written by the chat template that the model was trained with, or that its folder holds
        (`vocabulary.chat_template`), and an answer ends with the token that ends a turn there. UserError for a model
        without a chat template, and for messages that are none.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [of_list(list(each), "chat") for each in ([messages] if one else messages)]
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens} should be at least 1")
        if not conversations:
            return []
        parts = [self.template.prompt(conversation).parts() for conversation in conversations]
        tokens = [self.vocabulary.encode_parts(each)[0].tolist() for each in parts]
        sources = None
        if self.has_encoder:
            sources = [[*source, *self._end] for source in tokens]
            tokens = [[self.start_id]] * len(sources)
        sampling, stops = Sampling(temperature, top_k, top_p), [*self.template.stop_ids(), *self.ends]
        return self._continued(tokens, sources, stops, max_new_tokens, sampling, seed, beyond_max_length)

    @functools.cached_property
    def template(self) -> Chat:
        """The chat template that it was trained with, or that its folder holds. UserError if there is none."""
        template = self.vocabulary.chat_template
        if not template:
            raise UserError(
                "the model has no chat template: it was trained without config.data.chat.template; use generate, or "
                "put chat_template.jinja beside its tokenizer"
            )
        return Chat(template, self.vocabulary, where="the model's chat template")

    @property
    def _end(self) -> list[int]:
        return [] if self.vocabulary.eos_id is None else [self.vocabulary.eos_id]

    def _continued(
        self,
        tokens: list[list[int]],
        sources: list[list[int]] | None,
        stops: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        beyond_max_length: bool,
    ) -> list[str]:
        """The text that follows each prompt, up to the first of the tokens `stops`."""
        self._check_prompt(max(map(len, sources or tokens)))
        self._check_length(max(map(len, tokens)), max_new_tokens, beyond_max_length)
        new = decode.generate(
            *self._for_decoding,
            tokens,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=stops,
            sources=sources,
        )
        return [self._continuation(prompt, row) for prompt, row in zip(tokens, new, strict=True)]

    def log_likelihood(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        *,
        truncate: str = "error",
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> list[tuple[float, bool]]:
        """(natural log-probability of each continuation after its context, whether it is the greedy one).

        truncate="left" drops the beginning of contexts that are too long. The numbers of a text do not depend on the
        others, but in their last bits on tokens_per_batch (inference/score.py). An encoder-decoder reads contexts as
        sources; no end is scored unless the continuation holds it. An empty continuation is certain; UsageError for one
        that only changes tokens of its context and adds none.
        """
        if isinstance(contexts, str) or isinstance(continuations, str):
            raise UsageError("log_likelihood takes lists of texts: log_likelihood([context], [continuation])")
        if len(contexts) != len(continuations):
            raise UsageError(f"log_likelihood: {len(contexts)} contexts but {len(continuations)} continuations")
        sources = [self._encode_source(text) for text in contexts] if self.has_encoder else None
        if sources is None:
            rows = [self._encode_pair(*pair) for pair in zip(contexts, continuations, strict=True)]
        else:
            rows = [([self.start_id, *self._encode_answer(text)], 1) for text in continuations]
        found = score(
            self.model, self.params, rows, sources=sources, truncate=truncate, tokens_per_batch=tokens_per_batch
        )
        for likelihood, context, text in zip(found, contexts, continuations, strict=True):
            if text and not likelihood.tokens:
                raise UsageError(
                    f"log_likelihood: {text!r:.60} adds no token to the tokens of {context[-40:]!r}, so that it has no "
                    "likelihood; let it begin where a token does, after a blank or a line end"
                )
        return [(likelihood.logp, likelihood.greedy) for likelihood in found]

    def _encode(self, text: str) -> list[int]:
        """Tokens of a prompt: begins as a document does; an empty prompt starts after the end of the last one."""
        _check_text(text)
        tokens = self.vocabulary.encode(text, bos=True)
        if tokens or self.vocabulary.eos_id is None:
            return tokens
        return [self.vocabulary.eos_id]

    def _encode_source(self, text: str) -> list[int]:
        """Tokens of what an encoder reads; EOS ends them, as in training."""
        return [*self._encode_answer(text), *self._end]

    def _encode_answer(self, text: str) -> list[int]:
        """Tokens of a text with sentinels."""
        _check_text(text)
        return sentinels.encode(self.vocabulary, text)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """(tokens of both, index of the first continuation token).

        White space at the end of the context belongs to the continuation, since tokens often begin with it. Without a
        context all of it is scored, after what begins a document; with no such token its first cannot be.
        """
        stripped = context.rstrip()
        if not stripped:
            begin = self._encode("")
            _check_text(continuation)
            whole = begin + self.vocabulary.encode(context + continuation)
            return whole, min(max(len(begin), 1), len(whole))
        whole = self._encode(context + continuation)
        return whole, max(1, min(len(self._encode(stripped)), len(whole)))

    def _continuation(self, prompt: list[int], new: list[int]) -> str:
        """The text that the new tokens add: decoded together with the prompt, since a character may span both."""
        if self.has_encoder:
            begin = prompt[1:]  # the start token is no text, whatever its id stands for elsewhere
            return sentinels.decode(self.vocabulary, begin + new)[len(sentinels.decode(self.vocabulary, begin)) :]
        return self.vocabulary.decode(prompt + new)[len(self.vocabulary.decode(prompt)) :]

    def _check_tokens(self, tokens_BT: np.ndarray) -> None:
        if tokens_BT.min() < 0 or tokens_BT.max() >= self.vocabulary.size:
            found = f"{tokens_BT.min()} to {tokens_BT.max()}"
            raise UsageError(f"token ids should be from 0 to {self.vocabulary.size - 1}, found {found}")

    def _check_prompt(self, length: int) -> None:
        limit = self.model.config.max_length
        if length > limit:
            raise UsageError(f"a prompt of {length} tokens is longer than this model's max_length={limit}; shorten it")

    def _check_length(self, prompt: int, new: int, beyond: bool) -> None:
        limit, config = self.model.config.max_length, self.model.config
        learned = any(stack.position == "learned" for stack in config.stacks.values())
        self._check_prompt(prompt)
        if prompt + new - 1 > limit and (learned or not beyond):  # the last token is not fed
            remedy = "" if learned else ", or let positions go on with beyond_max_length"
            raise UsageError(
                f"{prompt} tokens of a prompt and {new} new ones are more than this model's max_length={limit}; "
                f"ask for at most {limit + 1 - prompt} new ones, shorten the prompt{remedy}"
            )


def _check_text(text: str) -> None:
    """Bytes of the command line that are no UTF-8, and halves of surrogate pairs, have no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"text {text[:40]!r} is no UTF-8 at character {error.start}; give it as UTF-8") from None


@functools.cache
def _compiled(function: Callable[..., Any], platform: str) -> Callable[..., Any]:
    """`function(model, ...)` with the compiler options that reading a model has."""
    return jax.jit(function, static_argnums=0, compiler_options=READING.compiler_options.of(platform))


def _logits(model: Model, params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    hidden_BTD, head = model.score_input(params, model.apply(params, batch))
    return logits(hidden_BTD, head)[:, :, : head.vocab_size]


def load(
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    ema: bool = False,
    mesh: Mesh | None = None,
    rules: str = "",
    dtype: str = "compute",
    base: LanguageModel | str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """The model of a workdir, model directory or Hugging Face folder.

    base: of an adapter, the model that it was trained on, if that is loaded already; then its parameters serve both,
    and any number of adapters. Or the directory where that model lies now, if it is not found where it lay.

    step: of a workdir, its newest checkpoint if None; `ema` takes the averaged parameters. They lie on the first
    device, or on `mesh` as `rules` (as in `config.mesh.rules`) say; then call it under `jax.set_mesh(mesh)`. `dtype`:
    "compute" holds matrices once in the type that they are multiplied in (bfloat16 on an accelerator), "stored" all as
    saved, a name such as "bfloat16" matrices in that type, "int8" as whole numbers with a scale for each output
    channel, made while they are read; norms and biases stay as saved, and so does what was saved in int8. Raises
    UserError where something is missing or damaged.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is unknown; {nearest(dtype, DTYPES)}")
    spare_search()
    onto = base if isinstance(base, LanguageModel) else None
    if onto is not None and (mesh is not None or rules or dtype != "compute"):
        raise UsageError("load: an adapter lies on mesh, rules and dtype of its base; give them there")
    at = os.fspath(base) if isinstance(base, str | os.PathLike) else None
    given = patterns.one(os.fspath(directory))
    found = loading.read(given, step=step, ema=ema, mesh=mesh, rules=rules, dtype=dtype, onto=onto, base=at)
    return LanguageModel(*(getattr(found, field.name) for field in dataclasses.fields(Loaded)))
