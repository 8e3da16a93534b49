"""SentencePiece models as a `TokenizerFile`, with the tokens that files beside them add."""

import pathlib
from collections.abc import Sequence
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import cuts, sentencepiece_files
from t5x_like.data.tokenizers.added_tokens import AddedToken, Division
from t5x_like.data.tokenizers.tokenizer_files import TokenizerFile, named_sentinels, piece_bytes


class _SentencePiece:
    def __init__(self, processor: Any, division: Division, plain: Any, *, legacy: bool):
        self._processor, self._division, self._plain, self._legacy = processor, division, plain, legacy

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._division.divides:
            return self._encode(texts)
        return [[*self._division.encode(text, self._encode, self._encode_later)] for text in texts]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def _encode_later(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._behind_added(text).encode(text, num_threads=1) for text in texts]

    def _behind_added(self, text: str) -> Any:
        """What encodes a text behind an added token: `plain` puts no space before it."""
        return self._processor if self._legacy and not text.startswith(" ") else self._plain

    def encode_parts(self, parts: Sequence[str | int]) -> list[tuple[list[int], list[int]]]:
        first = next((index for index, part in enumerate(parts) if part != ""), 0)
        return [
            ([], [])
            if isinstance(part, int)
            else (self._encode_part(part, later=index > first), self._count(part, later=index > first))
            for index, part in enumerate(parts)
        ]

    def _encode_part(self, text: str, *, later: bool) -> list[int]:
        return [*self._division.encode(text, self._encode_later if later else self._encode, self._encode_later)]

    def count_bytes(self, text: str) -> list[int]:
        return self._count(text, later=False)

    def _count(self, text: str, *, later: bool) -> list[int]:
        counts: list[int] = []
        divided = self._division.divide(text)
        contents = self._division.contents
        for index, part in enumerate(divided):
            if isinstance(part, int):
                counts.append(len(contents[part].encode()))
            elif part:
                behind = index > 0 or later
                found = _count_pieces(self._behind_added(part) if behind else self._processor, part)
                if not found and counts:
                    counts[-1] += len(part.encode())
                counts += found
        return counts

    def decode(self, ids: list[int]) -> str | None:
        return None


def _count_pieces(processor: Any, text: str) -> list[int]:
    try:
        proto = processor.encode(text, out_type="proto")
    except ValueError:  # the name before sentencepiece 0.2.2
        proto = processor.encode(text, out_type="immutable_proto")
    counts = [len(piece.surface.encode()) for piece in proto.pieces]
    return _spread(counts, [processor.is_byte(piece.id) for piece in proto.pieces], len(text.encode()))


# A second normalizer_spec of a ModelProto, which protobuf merges into the first: add_dummy_prefix = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def read(
    content: bytes,
    path: pathlib.Path,
    *,
    extra_ids: int,
    added: Sequence[AddedToken] = (),
    legacy: bool = False,
) -> TokenizerFile:
    """From a serialized SentencePiece model; `path` is its name in messages. `added` stand behind its pieces."""
    processor = _processor(content, path)
    size = processor.get_piece_size()
    for token in added:
        if token.id < size and processor.id_to_piece(token.id) != token.content:
            raise UserError(
                f"{path}: its token {token.id} is {processor.id_to_piece(token.id)!r}, and the files beside it add "
                f"{token.content!r} with the same id; give the model that the added tokens belong to"
            )
    more = tuple(token for token in added if token.id >= size)
    surfaces = [_sentencepiece_surface(processor, token) for token in range(size)]
    surfaces += [b""] * (max((token.id + 1 for token in more), default=size) - size)
    for token in more:
        surfaces[token.id] = b"" if token.special else token.content.encode()
    division = Division(more)
    plain = _processor(content + _NO_DUMMY_PREFIX, path)
    bos, eos = processor.bos_id(), processor.eos_id()
    return TokenizerFile(
        "sentencepiece",
        "tokenizer.model",
        content,
        _SentencePiece(processor, division, plain, legacy=legacy),
        (*surfaces, *(b"",) * extra_ids),
        bos if bos >= 0 else None,
        eos if eos >= 0 else None,
        extra_ids,
        cuts.between_tokens(surfaces),
        named_sentinels=0 if more else named_sentinels(processor.id_to_piece, size),
        added=more,
        legacy=legacy and bool(more),
        rounds=sentencepiece_files.read(content, path).kind == sentencepiece_files.UNIGRAM,
        found=tuple(division.contents.values()),
        hides_sentinels=any(token.content == "<extra_id_0>" for token in more),
        specials=(
            *((processor.id_to_piece(token), token) for token in range(size) if processor.is_control(token)),
            *((token.content, token.id) for token in more if token.special),
        ),
    )


def token_ids(file: TokenizerFile, content: bytes, path: pathlib.Path) -> dict[str, int]:
    """{piece: id} of a SentencePiece model and its added tokens."""
    processor = _processor(content, path)
    pieces = {processor.id_to_piece(token): token for token in range(processor.get_piece_size())}
    return pieces | {token.content: token.id for token in file.added}


def _processor(content: bytes, path: pathlib.Path) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: not a SentencePiece model nor a tokenizer.json") from None
    return processor


def _sentencepiece_surface(processor: Any, token: int) -> bytes | None:
    if processor.is_unknown(token):
        return None
    if processor.is_control(token) or processor.is_unused(token):
        return b""
    return piece_bytes(processor.id_to_piece(token))


def _spread(counts: list[int], is_byte: list[bool], total: int) -> list[int]:
    """Corrects counts from spans: byte pieces of one character hold one byte each, and all add up to `total`."""
    counts = list(counts)
    begin = 0
    while begin < len(counts):
        end = begin
        while end < len(counts) and is_byte[end]:
            end += 1
        if end > begin and sum(counts[begin:end]) == end - begin:
            counts[begin:end] = [1] * (end - begin)
        begin = end + 1
    if counts:
        counts[-1] += total - sum(counts)  # what the tokenizer dropped at the end, such as a last newline
    return counts
