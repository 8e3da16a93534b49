"""lm-evaluation-harness's interface to a model of ours. Needs the extra [eval]; import it late.

Encoding of pairs, empty contexts and rolling windows are the harness's own code; scores are inference/score.py's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.evaluation import generation
from t5x_like.evaluation.model import EvaluatedModel
from t5x_like.inference.sampling import GREEDY, Sampling
from t5x_like.inference.score import Likelihood, Row, score, score_rolling

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


class Backend(TemplateLM):
    """One model, all request types. `truncated`: requests whose beginning did not fit the model."""

    def __init__(self, subject: EvaluatedModel, *, batch_tokens: int, seed: int):
        super().__init__()
        self._subject, self._batch_tokens, self._seed = subject, batch_tokens, seed
        self.backend = "seq2seq" if subject.has_encoder else "causal"
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self._subject.vocabulary.eos_id if self._subject.vocabulary.eos_id is not None else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._subject.prefix_id

    @property
    def max_length(self) -> int:
        return self._subject.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._subject.vocabulary.fingerprint

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        del disable_tqdm  # the harness's bars say less than the command's lines
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if kwargs:
            raise TypeError(f"tok_encode: {', '.join(kwargs)} is not known")
        return self._subject.encode(string, special=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        found = self._score([(context, continuation) for _, context, continuation in requests])
        answers = [(likelihood.logp, likelihood.greedy) for likelihood in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        subject, limit = self._subject, self._subject.max_length
        sources = None
        if subject.has_encoder:
            rows: list[Row] = [([subject.start_id, *continuation], 1) for _, continuation in pairs]
            sources = [context for context, _ in pairs]
            self.truncated += sum(len(source) > limit for source in sources)
        else:
            rows = [(context + continuation, len(context)) for context, continuation in pairs]
            self.truncated += sum(len(ids) > limit + 1 for ids, _ in rows)
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > limit:
            raise UserError(
                f"{subject.name}: an answer of {longest} tokens is longer than this model's max_length={limit}; "
                "evaluate it with a model that reads more, or leave that task out"
            )
        return score(
            subject.model,
            subject.params,
            rows,
            sources=sources,
            mesh=subject.mesh,
            tokens_per_batch=self._batch_tokens,
            truncate="left",
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sums over all tokens of each text, BOS and EOS not among them; the first follows the prefix token."""
        subject = self._subject
        texts = [subject.encode(request.args[0], special=False) for request in requests]
        if subject.has_encoder:
            found = self._rolling_after_sources(texts)
        else:
            rows = [[subject.prefix_id, *ids] for ids in texts]
            scored = score_rolling(
                subject.model, subject.params, rows, mesh=subject.mesh, tokens_per_batch=self._batch_tokens
            )
            found = [likelihood.logp for likelihood in scored]
        for request, logp in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return found

    def _rolling_after_sources(self, texts: Sequence[list[int]]) -> list[float]:
        """The encoder reads what stands before a window, as the harness has it: one token in most cases."""
        windows = [
            [
                utils.make_disjoint_window(pair)
                for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            ]
            for ids in texts
        ]
        scored = iter(self._score([pair for each in windows for pair in each]))
        return [sum(next(scored).logp for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(_arguments(request)[1]), []).append(index)
        answers = [""] * len(requests)
        for chosen in groups.values():
            limits = self._limits(requests[chosen[0]])
            prompts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in chosen]
            room = generation.room(self._subject, limits)
            self.truncated += sum(len(prompt) > room for prompt in prompts)
            found = generation.generate(self._subject, prompts, limits, batch_tokens=self._batch_tokens)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
                if limits.sampling.temperature == 0:
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
        return answers

    def _limits(self, request: Instance) -> generation.Limits:
        try:
            limits = read_limits(_arguments(request)[1], seed=self._seed)
            generation.room(self._subject, limits)
            return limits
        except UsageError as error:
            raise UsageError(f"task {request.task_name}: {error}") from None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._subject.chat is None:
            raise UserError(f"{self._subject.name}: it is asked without a chat template; leave --chat out")
        return self._subject.chat.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._subject.chat.template if chat_template and self._subject.chat is not None else ""


def _arguments(request: Instance) -> tuple[Any, ...]:
    return request.args  # which the harness annotates as no tuple in particular


# The names that a length has in tasks, the first that is given counts; and what else generation_kwargs may hold.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
_DEFAULT_LENGTH = 256


def read_limits(given: Mapping[str, Any], *, seed: int) -> generation.Limits:
    """Of a task's generation_kwargs, as the harness reads them. EOS always ends an answer."""
    for name in given:
        if name not in _GENERATION:
            raise UsageError(f"generation_kwargs.{name}={given[name]!r} is not supported; {nearest(name, _GENERATION)}")
    length = next((given[name] for name in _LENGTHS if given.get(name) is not None), _DEFAULT_LENGTH)
    sampled = given.get("do_sample")
    if sampled is None:
        sampled = float(given.get("temperature") or 0.0) > 0
    sampling = GREEDY
    if sampled:
        top_k, top_p = int(given.get("top_k") or 0), float(given.get("top_p", 1.0))
        sampling = Sampling(float(given.get("temperature", 1.0)), top_k, top_p)
    until = given.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    return generation.Limits(int(length), stops, sampling, seed)
