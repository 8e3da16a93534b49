"""How many floating-point operations a model needs for one token, counted from its sizes. Nothing is measured here.

Convention (printed once by a run): matrix products only, the head included, a multiply-add being two operations; the
embedding lookup, norms and activations are not counted; attention counts the keys that a token really sees (half of a
causal row, at most a window); training is three times the forward pass; recomputation by remat is not counted. An
encoder-decoder is counted by tokens of the decoder: what the encoder does for a row is divided among them.
"""

import dataclasses

from t5x_like.models.config import ModelConfig, StackConfig

CONVENTION = (
    "matrix products incl. head, 2 per multiply-add; attention over the keys seen (causal half, windows); "
    "training = 3 x forward; no lookup, no recomputation"
)


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Of one token, averaged over a row. forward is the sum of the first three; train is 3 x forward.

    full_attention: what attention would need if every token saw all of its row, as others count it.
    """

    weights: float  # products with the layers' weights
    attention: float  # queries with keys, probabilities with values
    head: float  # logits
    full_attention: float

    @property
    def forward(self) -> float:
        return self.weights + self.attention + self.head

    @property
    def train(self) -> float:
        return 3 * self.forward

    @property
    def unmasked(self) -> "FlopsPerToken":
        """The same in the convention that knows no masks."""
        return dataclasses.replace(self, attention=self.full_attention)


def per_token(config: ModelConfig, *, length: int, source_length: int = 0) -> FlopsPerToken:
    """Of rows of `length` tokens, for an encoder-decoder with sources of `source_length`."""
    width, encoder, decoder = config.width, config.encoder, config.decoder
    head = 2.0 * width * (config.vocab_size + (width if config.head.transform else 0))
    if decoder is None:
        assert encoder is not None, "every architecture has a stack"
        full = _full_attention(encoder, length)
        return FlopsPerToken(_weights(encoder, width), _attention(encoder, length, causal=False), head, full)
    weights, attention = _weights(decoder, width), _attention(decoder, length, causal=True)
    full = _full_attention(decoder, length)
    if encoder is None:
        return FlopsPerToken(weights, attention, head, full)
    sources = source_length / length  # tokens of the encoder for each one of the decoder
    query, key_value = (2.0 * decoder.layers * size for size in _projections(decoder, width))
    weights += query + sources * (key_value + _weights(encoder, width))
    cross = 4.0 * decoder.layers * decoder.heads * decoder.head_size * source_length
    attention += cross + sources * _attention(encoder, source_length, causal=False)
    full += cross + sources * _full_attention(encoder, source_length)
    return FlopsPerToken(weights, attention, head, full)


def of_new_token(config: ModelConfig, *, length: int, source_length: int = 0) -> float:
    """FLOPs of one token that is decoded behind `length` others, which are in a cache, as are those of a source."""
    decoder, width = config.decoder, config.width
    assert decoder is not None, "an encoder alone decodes nothing"
    head = 2.0 * width * (config.vocab_size + (width if config.head.transform else 0))
    keys = sum(min(kind.window or length, length) for kind in decoder.kinds)
    total = _weights(decoder, width) + 4.0 * decoder.heads * decoder.head_size * keys + head
    if config.encoder is not None:
        total += 2.0 * decoder.layers * _projections(decoder, width)[0]
        total += 4.0 * decoder.layers * decoder.heads * decoder.head_size * source_length
    return total


def _projections(stack: StackConfig, width: int) -> tuple[int, int]:
    """Numbers in the matrices of one attention branch: (queries and output, keys and values)."""
    return 2 * width * stack.heads * stack.head_size, 2 * width * stack.kv_heads * stack.head_size


def _weights(stack: StackConfig, width: int) -> float:
    """Operations of a token with the weights of a stack, cross attention left out."""
    mlp = width * stack.mlp * (3 if stack.gated else 2)
    return 2.0 * stack.layers * (sum(_projections(stack, width)) + mlp)


def _attention(stack: StackConfig, length: int, *, causal: bool) -> float:
    keys = sum(keys_seen(length, kind.window, causal=causal) for kind in stack.kinds)
    return 4.0 * stack.heads * stack.head_size * keys


def _full_attention(stack: StackConfig, length: int) -> float:
    return 4.0 * stack.layers * stack.heads * stack.head_size * length


def keys_seen(length: int, window: int, *, causal: bool = True) -> float:
    """Keys that a query of a row sees on average, itself included; window 0 is none.

    >>> keys_seen(4, 0), keys_seen(4, 2), keys_seen(4, 0, causal=False), keys_seen(4, 2, causal=False)
    (2.5, 1.75, 4.0, 2.5)
    """
    reach = min(window, length) if window else length
    before = (reach * (reach + 1) / 2 + (length - reach) * reach) / length
    return before if causal else 2 * before - 1
