"""A model directory ready to use from Python: logits, generation, log-likelihoods. No training, no server.

lm = t5x_like.load("runs/tiny")
lm.generate(["To be, or"], max_new_tokens=40, temperature=0.8, seed=1)
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5x_like.compress import quant_array
from t5x_like.compress import reading as quantizing
from t5x_like.compress.quant_array import QuantArray
from t5x_like.convert.convert import load_params
from t5x_like.convert.foreign import is_foreign, open_foreign
from t5x_like.core import dtypes, tree
from t5x_like.core.config import nearest
from t5x_like.core.environment import READING, spare_search
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import ParamSpec, Tree
from t5x_like.data.read import source_target
from t5x_like.data.templates.chat import Chat
from t5x_like.data.templates.messages import of_list
from t5x_like.data.tokenizers import behind, sentinels, vocabularies
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.inference import decode
from t5x_like.inference.heads import read_last
from t5x_like.inference.sampling import Sampling
from t5x_like.inference.score import TOKENS_PER_BATCH, score
from t5x_like.inference.weights import for_decoding, in_dtype
from t5x_like.layers.scoring.head import logits
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.parallel.sharding import named
from t5x_like.runs import adapters, roles
from t5x_like.storage import model_directory, paths, patterns
from t5x_like.storage.reading import Place

# How the matrices of a model may be held; see `load`.
DTYPES = ("compute", "stored", *dtypes.NAMES, "int8")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Functions of a model, its parameters and its vocabulary. Made by `t5x_like.load`.

    start_id: the token that the decoder of an encoder-decoder begins with. checkpoint: where the parameters were read,
    if that is one of ours. mesh: where they lie, None for one device.
    """

    model: Model
    params: Tree
    vocabulary: Vocabulary
    start_id: int = 0
    checkpoint: str | None = None
    mesh: Mesh | None = None

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
        sampling, stops = Sampling(temperature, top_k, top_p), [self.vocabulary.eos_id]
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
        parts = [self._chat.prompt(conversation).parts() for conversation in conversations]
        tokens = [self.vocabulary.encode_parts(each)[0].tolist() for each in parts]
        sources = None
        if self.has_encoder:
            sources = [[*source, *self._end] for source in tokens]
            tokens = [[self.start_id]] * len(sources)
        sampling, stops = Sampling(temperature, top_k, top_p), self._chat.stop_ids()
        return self._continued(tokens, sources, stops, max_new_tokens, sampling, seed, beyond_max_length)

    @functools.cached_property
    def _chat(self) -> Chat:
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
        stops: Sequence[int | None],
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
            stop_id=stops[0] if stops else None,
            sources=sources,
        )
        new = [[*itertools.takewhile(lambda token: token not in stops, row)] for row in new]
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
        sources; no end is scored unless the continuation holds it.
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
        return [(likelihood.logp, likelihood.greedy) for likelihood in found]

    def read(self, prompts: Sequence[str], answers: Sequence[str], *, head: str = "reward") -> np.ndarray:
        """What a scalar head (config.model.scalar_heads) says of each answer to its prompt, float32: of a reward model
        the reward. Texts are those that it was trained on (features "pair_texts"): each answer ends with EOS."""
        if isinstance(prompts, str) or isinstance(answers, str) or len(prompts) != len(answers):
            raise UsageError("read takes lists of as many texts: read([prompt], [answer])")
        for text in (*prompts, *answers):
            _check_text(text)
        before = [self.vocabulary.encode(text, bos=True, eos=self.has_encoder) for text in prompts]
        # With an encoder the answers begin texts of their own.
        found = behind.encode(self.vocabulary, [""] * len(prompts) if self.has_encoder else prompts, answers)
        after = [
            [*ids.tolist(), *([] if self.vocabulary.eos_id is None else [self.vocabulary.eos_id])] for ids, _ in found
        ]
        begins = [[self.start_id]] * len(before) if self.has_encoder else before
        texts = [[*begin, *end] for begin, end in zip(begins, after, strict=True)]
        sources = before if self.has_encoder else None
        return read_last(self.model, self.params, texts, sources=sources, head=head, mesh=self.mesh)

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
    base: LanguageModel | None = None,
) -> LanguageModel:
    """The model of a workdir, model directory or Hugging Face folder.

    base: of an adapter, the model that it was trained on, if that is loaded already; then its parameters serve both,
    and any number of adapters.

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
    devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
    platform = devices[0].platform
    if base is not None and (mesh is not None or rules or dtype != "compute"):
        raise UsageError("load: an adapter lies on mesh, rules and dtype of its base; give them there")
    directory = patterns.one(os.fspath(directory))
    if is_foreign(directory):
        if step is not None or ema:
            raise UsageError(f"{directory} is no workdir: it holds no steps and no averaged parameters")
        return _load_foreign(directory, mesh=mesh, rules=rules, dtype=dtype, platform=platform)
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
    item = "ema" if ema else "params"
    model = roles.build_model(config, rules=rules, platform=platform) if base is None else base.model
    mesh = mesh if base is None else base.mesh
    put = functools.partial(_templates, model, mesh, dtype="stored")
    if base is None:
        wanted = _templates(model, mesh, model.specs(), dtype)
        quantized = {"kinds": quant_array.KINDS, "place": _place(model, mesh)}
        params = adapters.restore_attached(place.checkpoint, item, model, wanted, put, **quantized)
    else:
        params = adapters.restore_onto(base.params, model, base.checkpoint, place.checkpoint, item, put)
    return LanguageModel(model, params, vocabulary, _start_id(model, metadata, vocabulary), place.checkpoint, mesh)


def _start_id(model: Model, note: Mapping[str, Any], vocabulary: Vocabulary) -> int:
    """What the decoder behind an encoder begins with: as the data of a run said, or the folder that it was converted
    from; else 0, as T5."""
    name = note.get("config", {}).get("data", {}).get("start_token")
    if name is not None and model.config.architecture == "encoder_decoder":
        return source_target.start_id(name, vocabulary)
    stored = [(note.get(part) or {}).get("decoder_start_token_id") for part in ("generation_config", "token_ids")]
    return next((token for token in stored if isinstance(token, int)), 0)


def _templates(model: Model, mesh: Mesh | None, specs: Tree, dtype: str) -> dict[str, Any]:
    """Where each parameter shall lie, and in which type."""
    held = {"compute": model.dtypes.compute, "int8": model.dtypes.compute, "stored": None}.get(dtype, dtype)
    specs = specs if held is None else in_dtype(specs, held)

    def template(path: str, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        del path
        sharding = None if mesh is None else named(mesh, model.rules, spec.axes, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    plain = tree.map_with_path(template, specs)
    return quantizing.templates(specs, plain, _place(model, mesh)) if dtype == "int8" else plain


def _place(model: Model, mesh: Mesh | None) -> Place:
    """Where a leaf, or a part of one in several parts, shall lie; None for the first device."""
    specs = tree.flatten(model.specs())

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
        if mesh is None:
            return None
        spec = specs[path] if path in specs else specs[path.rpartition("/")[0]]
        # A scale has dims of size 1 where its weight has been summed.
        axes = tuple(
            axis if size == shape[dim] else None
            for dim, (axis, size) in enumerate(zip(spec.axes, spec.shape, strict=True))
        )
        return named(mesh, model.rules, axes, shape)

    return place


def _load_foreign(directory: str, *, mesh: Mesh | None, rules: str, dtype: str, platform: str) -> LanguageModel:
    with open_foreign(directory) as foreign:
        if not foreign.tokenizer:
            raise UserError(f"{directory} holds no tokenizer; copy its tokenizer.json there")
        vocabulary = vocabularies.load(os.path.dirname(foreign.tokenizer[0]))
        models: list[Model] = []

        def templates(config: model_config.ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
            models.append(roles.build_model(config, rules=rules, platform=platform))
            return tree.flatten(_templates(models[0], mesh, models[0].specs(), dtype))

        def packed(path: str, values: np.ndarray, scale: np.ndarray) -> QuantArray:
            spec = tree.flatten(models[0].specs())[path]
            return quantizing.placed(path, values, scale, spec.axes, _place(models[0], mesh))

        params = load_params(foreign, templates, packed=packed)
    return LanguageModel(models[0], params, vocabulary, _start_id(models[0], foreign.extra, vocabulary))
