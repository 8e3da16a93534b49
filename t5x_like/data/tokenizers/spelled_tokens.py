"""A text that spells out a special token is text: also where the token is a piece of the model, as in T5's unigram.

The library leaves such a text to the model, and a model that has `</s>` among its pieces makes the end token of it. So
texts are encoded by a copy in which the special pieces have names that no text has; all ids stay what they are.
"""

import json
import re
from typing import Any

import numpy as np

_NEVER = "\U0010ffff\U0010fffe"  # no characters: Unicode keeps them out of texts


def hidden(layout: dict[str, Any]) -> dict[str, Any] | None:
    """A tokenizer.json with other ids only for texts that spell special tokens; None: those are texts already."""
    model = layout.get("model") or {}
    special = {token["content"] for token in layout.get("added_tokens", []) if token["special"]} - {""}
    if model.get("type") == "Unigram":
        pieces = {piece for piece, _ in model["vocab"]}
        special |= {piece for piece in pieces if re.fullmatch(r"<extra_id_\d+>", piece)}
        if not special & pieces:
            return None
        vocabulary: Any = [[_NEVER + piece if piece in special else piece, score] for piece, score in model["vocab"]]
        return _renamed(layout, special, model | {"vocab": vocabulary})
    if model.get("type") != "BPE" or not special & model["vocab"].keys():
        return None
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    made = {"".join(merge) for merge in merges}
    if not special & made and not model.get("ignore_merges"):
        return None
    kept = [merge for merge in merges if not {*merge, "".join(merge)} & special]
    names = {piece: _NEVER + piece for piece in special}
    vocabulary = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    unknown = model.get("unk_token")
    changed = {"vocab": vocabulary, "merges": kept, "unk_token": names.get(unknown, unknown)}
    return _renamed(layout, special, model | changed)


def _renamed(layout: dict[str, Any], special: set[str], model: dict[str, Any]) -> dict[str, Any]:
    added = [
        token | {"content": _NEVER + token["content"]} if token["content"] in special else token
        for token in layout.get("added_tokens", [])
    ]
    return layout | {"added_tokens": added, "model": model, "post_processor": None}


def encoder(layout: dict[str, Any], tokenizer: Any) -> Any:
    """The library's tokenizer that encodes texts: `tokenizer`, or a copy in which no text makes a special token."""
    import tokenizers

    changed = hidden(layout)
    if changed is not None:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(changed))
    _exact(tokenizer, (changed or layout).get("model") or {})
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def finder(layout: dict[str, Any]) -> Any:
    """The library's tokenizer that makes special tokens of what spells them: for texts that a chat template wrote."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(layout))
    _exact(tokenizer, layout.get("model") or {})
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _exact(tokenizer: Any, model: dict[str, Any]) -> None:
    import tokenizers

    if model.get("type") == "Unigram" and all(score == np.float32(score) for _, score in model["vocab"]):
        # Of a SentencePiece model. The library's JSON reader is off by a last bit, which would decide exact ties.
        pieces = [(piece, float(score)) for piece, score in model["vocab"]]
        unknown, fallback = model.get("unk_id"), bool(model.get("byte_fallback"))
        tokenizer.model = tokenizers.models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback)
