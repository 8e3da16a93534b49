"""The tokenizer.json that a SentencePiece model in a folder of transformers amounts to, as its version 5 makes it.

Transformers does not run the model. It makes a BPE or a unigram of the `tokenizers` library from the pieces, with the
spaces and the tokens of the class that the folder names, and adds tokens in a fixed order: those of the settings by
id, then the named ones (BOS, EOS, ...), then the extra ones. A token that the model lacks gets the next free id.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import sentencepiece_files
from t5x_like.data.tokenizers.folders import REMEDY, SETTINGS, Folder
from t5x_like.data.tokenizers.sentencepiece_files import CONTROL, USER_DEFINED, SentencePieceFile

_SPACE = "\u2581"
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BEGIN_END = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NAMES = {  # the named tokens of each class that this file makes, where the settings do not say others
    "LlamaTokenizer": _BEGIN_END,
    "CodeLlamaTokenizer": _BEGIN_END
    | {f"{name}_token": f"{_SPACE}<{name[:3].upper()}>" for name in ("prefix", "middle", "suffix", "eot")}
    | {"fill_token": "<FILL_ME>"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GemmaTokenizer": {name: f"<{name.removesuffix('_token')}>" for name in _ORDER if name[:3] not in ("sep", "cls")},
    "XLMRobertaTokenizer": _BEGIN_END
    | {"sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
}
_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}


def layout(folder: Folder, model: pathlib.Path) -> tuple[dict[str, Any], tuple[str | None, str | None]]:
    """(tokenizer.json, names of BOS and EOS). UserError for files that do not fit together."""
    name = folder.tokenizer_class
    file = sentencepiece_files.read(model.read_bytes(), model)
    kind = _KINDS.get(file.kind)
    expected = "BPE" if name in ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer") else "unigram"
    if kind != expected:
        raise UserError(f"{model}: a {kind} model, and the {name} that the files beside it name is a {expected}")
    named, extra, given = folder.tokens(_NAMES[name])
    if extra is None:
        extra = [
            _token(piece, special=type_ == CONTROL)
            for piece, _, type_ in file.pieces
            if type_ in (CONTROL, USER_DEFINED)
        ]
        if name == "T5Tokenizer":
            extra += [_token(text, special=True) for text in _sentinels(folder)]
    try:
        tokenizer = _MAKE[name](file, folder, {key: token["content"] for key, token in named.items()})
        tokenizer.add_tokens([*_added(given, named, extra)])
        for token in given:
            _expect_id(tokenizer, token, folder)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{model}: no {name} can be made of it ({str(error).splitlines()[0]})") from None
    begin, end = (named[key]["content"] if key in named else None for key in ("bos_token", "eos_token"))
    return json.loads(tokenizer.to_str()), (begin, end)


def _expect_id(tokenizer: Any, token: dict[str, Any], folder: Folder) -> None:
    found = tokenizer.token_to_id(token["content"])
    if found != token["id"]:
        raise UserError(
            f"{folder.path}: its added token {token['content']!r} should have the id {token['id']}, and transformers 5 "
            f"gives it {found}, behind the pieces and the tokens before it; {REMEDY}"
        )


def _token(content: str, *, special: bool) -> dict[str, Any]:
    return {"content": content, "special": special, "normalized": False}


def _added(
    given: list[dict[str, Any]], named: Mapping[str, dict[str, Any]], extra: list[dict[str, Any]]
) -> Iterator[Any]:
    """AddedTokens of the library in the order in which they get ids, each text once."""
    from tokenizers import AddedToken

    names = {token["content"] for token in named.values()}
    seen: set[str] = set()
    for token in [*given, *named.values(), *extra]:
        content = token["content"]
        if content in seen:
            continue
        seen.add(content)
        special = bool(token.get("special")) or content in names
        flags = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word")}
        yield AddedToken(content, special=special, normalized=bool(token.get("normalized", not special)), **flags)


def _sentinels(folder: Folder) -> list[str]:
    return [f"<extra_id_{at}>" for at in range(folder.sentinels())]


def _bpe(file: SentencePieceFile, unknown: str | None) -> Any:
    from tokenizers import Tokenizer, models

    ranks = {piece: rank for rank, (piece, _, _) in enumerate(file.pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece in ranks
        for at in range(1, len(piece))
        if {piece[:at], piece[at:]} <= ranks.keys()
    ]
    return Tokenizer(models.BPE(vocab=ranks, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))


def _unigram(file: SentencePieceFile, pieces: list[tuple[str, float]], *, unknown: int, prepend: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    if file.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(file.charsmap)
    spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=prepend)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=prepend)
    return tokenizer


def _llama(file: SentencePieceFile, folder: Folder, named: Mapping[str, str]) -> Any:
    from tokenizers import decoders, pre_tokenizers

    code = folder.tokenizer_class == "CodeLlamaTokenizer"
    tokenizer = _bpe(file, named.get("unk_token") if code else None)
    prefix = folder.settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    everywhere = bool(folder.settings.get("legacy", False)) and not code
    prepend = ("always" if everywhere else "first") if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=prepend, split=False)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)] if prefix or code else parts)
    return tokenizer


def _gemma(file: SentencePieceFile, folder: Folder, named: Mapping[str, str]) -> Any:
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer = _bpe(file, named.get("unk_token"))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _t5(file: SentencePieceFile, folder: Folder, named: Mapping[str, str]) -> Any:
    pieces = [(piece, score) for piece, score, _ in file.pieces]
    if {piece for piece, _ in pieces} & {*_sentinels(folder)}:
        raise UserError(f'{folder.path / SETTINGS}: its model has <extra_id_0> itself; set "extra_ids": 0 there')
    pieces += [(text, 0.0) for text in reversed(_sentinels(folder))]
    return _unigram(file, pieces, unknown=2, prepend="always")


def _xlm_roberta(file: SentencePieceFile, folder: Folder, named: Mapping[str, str]) -> Any:
    first = [(named[f"{name}_token"], 0.0) for name in ("bos", "pad", "eos", "unk")]
    pieces = [*first, *((piece, score) for piece, score, _ in file.pieces[3:]), (named["mask_token"], 0.0)]
    prefix = folder.settings.get("add_prefix_space", True)
    return _unigram(file, pieces, unknown=3, prepend="always" if prefix else "never")


_MAKE = {
    "LlamaTokenizer": _llama,
    "CodeLlamaTokenizer": _llama,
    "T5Tokenizer": _t5,
    "GemmaTokenizer": _gemma,
    "XLMRobertaTokenizer": _xlm_roberta,
}
