"""How large a model, and how many tokens, for an amount of compute: the published fits of a loss, and what follows.

All of them have the form of Hoffmann et al. (arXiv 2203.15556, equation 2), N parameters trained on D tokens:

    loss(N, D) = E + A / N^alpha + B / D^beta          nats a token, on their data
    C = 6 N D                                          FLOPs of training (their appendix F)

At a fixed C the loss is least for N = G (C/6)^a and D = (C/6)^b / G (equation 4), where
G = (alpha A / (beta B))^(1 / (alpha + beta)), a = beta / (alpha + beta) and b = 1 - a. Everything here is an estimate:
constants belong to the data, tokenizer and training of those who fitted them, and most uses extrapolate.

Not here: sizes of a family, memory and meshes (runs/sizing.py). Standard library only.
"""

import dataclasses
import math

TRAIN_FLOPS, SERVE_FLOPS = 6.0, 2.0  # of a parameter and a token, in training and in inference


@dataclasses.dataclass(frozen=True)
class Choice:
    """A model and its training by a fit. loss: in nats a token."""

    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        return TRAIN_FLOPS * self.parameters * self.tokens

    @property
    def ratio(self) -> float:
        """Tokens a parameter."""
        return self.tokens / self.parameters


@dataclasses.dataclass(frozen=True)
class Fit:
    """Constants of a fit and who found them."""

    name: str
    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def exponent(self) -> float:
        """a: the best number of parameters grows as C^a."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def choice(self, parameters: float, tokens: float) -> Choice:
        return Choice(parameters, tokens, self.loss(parameters, tokens))

    def of_flops(self, flops: float) -> Choice:
        """The best model for this compute.

        >>> best = BESIROGLU.of_flops(5.76e23)  # that of Chinchilla, 70e9 parameters on 1.4e12 tokens
        >>> round(best.parameters / 1e9), round(best.tokens / 1e12, 1), round(best.ratio)
        (72, 1.3, 18)
        """
        parameters = self._G * (flops / TRAIN_FLOPS) ** self.exponent
        return self.choice(parameters, flops / TRAIN_FLOPS / parameters)

    def of_parameters(self, parameters: float) -> Choice:
        """The compute for which a model of this size is the best."""
        return self.choice(parameters, (parameters / self._G) ** (1 / self.exponent) / parameters)

    def of_tokens(self, tokens: float) -> Choice:
        """The compute for which this many tokens are the best."""
        return self.of_flops(TRAIN_FLOPS * (tokens * self._G) ** (1 / (1 - self.exponent)))

    def of_loss(self, loss: float) -> Choice:
        """The cheapest training that reaches a loss above E: both terms stand as beta to alpha there."""
        above = loss - self.E
        parameters = (self.A * (1 + self.alpha / self.beta) / above) ** (1 / self.alpha)
        tokens = (self.B * (1 + self.beta / self.alpha) / above) ** (1 / self.beta)
        return self.choice(parameters, tokens)

    def tokens_to(self, loss: float, parameters: float) -> float:
        """The tokens after which a model of this size reaches a loss; infinite where it never does."""
        left = loss - self.E - self.A / parameters**self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf

    def for_lifetime(self, loss: float, served: float) -> Choice:
        """The model that reaches a loss for the least FLOPs of training and of `served` tokens of inference together
        (arXiv 2401.00448, equation 3): smaller and longer trained than the cheapest to train."""
        large = self.of_loss(loss).parameters
        small = (self.A / (loss - self.E)) ** (1 / self.alpha)  # which never gets there
        low, high = math.log(small), math.log(large)

        def cost(logarithm: float) -> float:
            parameters = math.exp(logarithm)
            return lifetime_flops(parameters, self.tokens_to(loss, parameters), served)

        best = math.exp(_least(cost, low, high))
        return Choice(best, self.tokens_to(loss, best), loss)

    @property
    def _G(self) -> float:
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))


# As their TeX source has it, which Besiroglu et al. quote (their section 3): what is printed in section 3.3 is rounded
# (E 1.69, alpha 0.34, beta 0.28), and rounding alone makes the best ratio at Chinchilla's compute 93 instead of 59.
HOFFMANN = Fit(
    "Hoffmann et al. 2022",
    "arXiv 2203.15556, approach 3, unrounded",
    E=1.6934,
    A=406.4,
    B=410.7,
    alpha=0.3392,
    beta=0.2849,
)
# Their correction: the same data, read off a figure, fitted to convergence (arXiv 2404.10102, table 1; standard errors
# 0.03, 125, 1293, 0.02, 0.02). It agrees with approaches 1 and 2 of the former, about 20 tokens a parameter.
BESIROGLU = Fit(
    "Besiroglu et al. 2024", "arXiv 2404.10102, table 1", E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658
)
FITS = (BESIROGLU, HOFFMANN)
# FLOPs of the runs that both were fitted to (Hoffmann et al., section 3.2); beyond it they extrapolate.
FITTED = (6e18, 3e21)


@dataclasses.dataclass(frozen=True)
class Smaller:
    """A model smaller than the best for some compute, by one fit.

    at_compute: trained with the same compute. equal_loss: trained until it has the best one's loss; None where it
    never gets there. pays_from: tokens of inference from which on it has cost less than the best one, in all.
    """

    share: float
    at_compute: Choice
    equal_loss: Choice | None
    pays_from: float


def trade_off(fit: Fit, best: Choice, *, shares: tuple[float, ...] = (0.7, 0.5, 0.35, 0.25)) -> list[Smaller]:
    """What smaller models than the best cost in loss, or in compute until they have made up for it."""
    rows = []
    for share in shares:
        parameters = share * best.parameters
        at_compute = fit.choice(parameters, best.flops / TRAIN_FLOPS / parameters)
        tokens = fit.tokens_to(best.loss, parameters)
        if math.isinf(tokens):
            rows.append(Smaller(share, at_compute, None, math.inf))
            continue
        equal = Choice(parameters, tokens, best.loss)
        saved = SERVE_FLOPS * (best.parameters - parameters)
        rows.append(Smaller(share, at_compute, equal, max(equal.flops - best.flops, 0.0) / saved))
    return rows


def lifetime_flops(parameters: float, tokens: float, served: float) -> float:
    """FLOPs of training on `tokens` and of serving `served` tokens, prompts and answers."""
    return TRAIN_FLOPS * parameters * tokens + SERVE_FLOPS * parameters * served


def spread(values: list[float]) -> float:
    """How far estimates of one thing are apart: the largest over the least.

    >>> spread([2.0, 3.0])
    1.5
    """
    return max(values) / min(values)


def batch_tokens(flops: float) -> float:
    """Tokens of a batch near which the loss was least, by DeepSeek LLM's fit to 1e17 to 2e20 FLOPs (arXiv 2401.02954,
    section 3.1); what is read off it for more is extrapolated.

    >>> round(batch_tokens(1e20) / 1e6, 1)
    1.0
    """
    return 0.2920 * flops**0.3271


def _least(cost, low: float, high: float) -> float:
    """Where a function with one minimum between low and high is least, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return (low + high) / 2
