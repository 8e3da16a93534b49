"""A tokenizer folder as people have it from Hugging Face: which of its files says what.

`tokenizer.json` is used as it is. Without one, the tokenizer is made from a SentencePiece model, from `vocab.txt`
(WordPiece) or from `vocab.json` and `merges.txt` (byte-level BPE), as `tokenizer_class` says. Names of begin and end,
and tokens that were added later, stand in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
What is not supported is named.
"""

import json
import pathlib
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import word_cache
from t5x_like.data.tokenizers.added_tokens import AddedToken

SETTINGS = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MADE_OF_MODEL = ("", "LlamaTokenizer", "CodeLlamaTokenizer", "T5Tokenizer")  # by the model itself
REBUILT = ("LlamaTokenizer", "CodeLlamaTokenizer", "T5Tokenizer", "GemmaTokenizer", "XLMRobertaTokenizer")
_OF_FAMILY = {"t5": "T5Tokenizer", "xlm-roberta": "XLMRobertaTokenizer"} | {  # where only config.json says what it is
    name: "GemmaTokenizer" for name in ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
}
_WORD_PIECE = ("", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
_BYTE_LEVEL = ("", "GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "Qwen2Tokenizer")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
REMEDY = "save it again with AutoTokenizer.from_pretrained(...).save_pretrained(...), so that it has a tokenizer.json"


class Folder:
    """What the settings of a folder say; `of_model`: also those of the model that it belongs to, which may be all that
    name the class. Raises UserError, which names the file, for settings that are none.
    """

    def __init__(self, path: pathlib.Path, *, of_model: bool = False):
        self.path = path
        self.settings = _object(path / SETTINGS)
        model = _object(path / "config.json") if of_model else {}
        named = self.settings.get("tokenizer_class") or model.get("tokenizer_class")
        self.tokenizer_class = str(named or _OF_FAMILY.get(str(model.get("model_type")), "")).removesuffix("Fast")
        self._special = _object(path / "special_tokens_map.json")
        self._added = _object(path / "added_tokens.json")

    def name(self, key: str) -> str | None:
        """The text of `bos_token` and so on; None where no file names it."""
        for source in (self.settings, self._special):
            if key in source:
                found = source[key]
                text = found.get("content") if isinstance(found, dict) else found
                if text is not None and not isinstance(text, str):
                    raise UserError(f"{self.path / SETTINGS}: {key} should be a text, is {found!r:.60}")
                return text
        return None

    @property
    def names(self) -> tuple[str | None, str | None]:
        """(bos, eos)"""
        return self.name("bos_token"), self.name("eos_token")

    @property
    def chat_template(self) -> str:
        """How conversations are written for this tokenizer; "" where no file says so."""
        try:
            return (self.path / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except FileNotFoundError:
            found = self.settings.get("chat_template") or ""
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / CHAT_TEMPLATE}: not the text of a template ({error})") from None
        if isinstance(found, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default") or ""
        if not isinstance(found, str):
            raise UserError(f"{self.path / SETTINGS}: chat_template should be a text, is {found!r:.60}")
        return found

    def tokens(
        self, usual: dict[str, str]
    ) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]] | None, list[dict[str, Any]]]:
        """What transformers 5 reads of a folder without a tokenizer.json, each token as {"content": text, flag: bool}:
        (named tokens, where the settings say none the `usual`; extra special ones, None if none are listed; added
        ones by id). `special_tokens_map.json` and `added_tokens.json` count only without `added_tokens_decoder`.
        """
        decoder = self.settings.get("added_tokens_decoder")
        # Of the extra special tokens of special_tokens_map.json, version 5 follows those under their new name alone.
        more = {key: value for key, value in self._special.items() if key != "additional_special_tokens"}
        settings = self.settings if decoder is not None else self.settings | more
        for key in _NAMED:
            self.name(key)  # which refuses what is no text
        try:
            if decoder is not None:
                given = [decoder[at] | {"id": int(at)} for at in sorted(decoder, key=int)]
            else:
                given = [{"content": text, "id": int(at)} for text, at in self._added.items()]
                given.sort(key=lambda token: token["id"])
            listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
            own = listed if isinstance(listed, dict) else {}
            own = {key: value for key, value in settings.items() if key.endswith("_token")} | own
            found = {key: _flags(value) for key, value in (usual | own).items() if isinstance(value, str | dict)}
            extra = [*map(_flags, listed)] if isinstance(listed, list) else None
            named = {key: found[key] for key in _NAMED if key in found} | found
            names = {token["content"] for token in [*named.values(), *(extra or [])]}
            if decoder is None:  # their texts alone are known
                given = [token | {"special": token["content"] in names} for token in given]
            if not all(isinstance(token["content"], str) for token in [*named.values(), *(extra or []), *given]):
                raise ValueError("a content is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: its added tokens are not {{text: id}} ({error!r})") from None
        return named, extra, given

    def added(self) -> list[AddedToken]:
        """The tokens that were added to those of the tokenizer's own file, by id; some may be in that file too."""
        named = {self.name(key) for key in _NAMED} - {None}
        for source in (self.settings, self._special):
            for more in ("additional_special_tokens", "extra_special_tokens"):
                listed = source.get(more) or []
                named |= {entry["content"] if isinstance(entry, dict) else entry for entry in listed}
        try:
            found = {int(token): (content, content in named) for content, token in self._added.items()}
            for token, entry in self.settings.get("added_tokens_decoder", {}).items():
                special = bool(entry.get("special")) or entry["content"] in named
                found[int(token)] = (entry["content"], special)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: its added tokens are not {{text: id}} ({error!r})") from None
        return [AddedToken(token, content, special) for token, (content, special) in sorted(found.items())]

    def refuse_white_space(self) -> None:
        """UserError for added tokens that a SentencePiece model alone does not find as transformers does."""
        for entry in self.settings.get("added_tokens_decoder", {}).values():
            if not entry.get("special") and any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
                raise UserError(
                    f"{self.path / SETTINGS}: the added token {entry['content']!r} takes white space with it (lstrip, "
                    "rstrip or single_word), which a model by itself does not do; give the folder, with a "
                    "tokenizer_class in its settings"
                )

    def refuse_class(self, file: str, known: tuple[str, ...]) -> None:
        """UserError where the class gives other ids than the file alone."""
        if self.tokenizer_class not in known:
            raise UserError(
                f"{self.path / SETTINGS}: a {self.tokenizer_class} made of {file} is not supported "
                f"(known: {', '.join(filter(None, known))}); {REMEDY}"
            )

    def model(self) -> pathlib.Path | None:
        """Its SentencePiece model, if it has one."""
        models = sorted(self.path.glob("*.model"))
        if len(models) > 1:
            raise UserError(f"tokenizer {self.path}: has {len(models)} *.model; give the path of one of them")
        if models:
            with models[0].open("rb") as file:
                if is_foreign(file.read(200)):  # as Llama 3's own tokenizer.model
                    raise foreign(models[0])
            self.refuse_class(models[0].name, ("", *REBUILT))
        return models[0] if models else None

    def sentinels(self) -> int:
        """How many <extra_id_N> the class puts behind the model's pieces."""
        return int(self.settings.get("extra_ids", 100)) if self.tokenizer_class == "T5Tokenizer" else 0

    def layout(self) -> dict[str, Any] | None:
        """The tokenizer.json that its vocab.txt, or vocab.json and merges.txt, amount to; None where there are none."""
        if (self.path / "vocab.txt").is_file():
            self.refuse_class("vocab.txt", _WORD_PIECE)
            return _word_piece(self.path / "vocab.txt", self.settings)
        if (self.path / "vocab.json").is_file() and (self.path / "merges.txt").is_file():
            self.refuse_class("vocab.json and merges.txt", _BYTE_LEVEL)
            return _byte_level(self.path, self.tokenizer_class, bool(self.settings.get("add_prefix_space", False)))
        for path in (*sorted(self.path.glob("tekken*.json")), *sorted(self.path.glob("*.tiktoken"))):
            raise foreign(path)
        return None

    def complete(self, layout: dict[str, Any]) -> dict[str, Any]:
        """A tokenizer.json with the added tokens that it lacks, and those that the settings name as special ones."""
        known = {entry["id"] for entry in layout.get("added_tokens", [])}
        vocabulary = (layout.get("model") or {}).get("vocab", {})
        own = vocabulary if isinstance(vocabulary, dict) else {piece: at for at, (piece, _) in enumerate(vocabulary)}
        named = filter(None, map(self.name, _NAMED))
        missing = [token for token in self.added() if token.id not in known]
        listed = known | {token.id for token in missing}
        missing += [AddedToken(own[name], name, True) for name in named if name in own and own[name] not in listed]
        if not missing:
            return layout
        decoder = self.settings.get("added_tokens_decoder", {})
        entries = [_entry(token, decoder.get(str(token.id), {"normalized": not token.special})) for token in missing]
        whole = [*layout.get("added_tokens", []), *entries]
        unique = {entry["id"]: entry for entry in whole}
        return layout | {"added_tokens": [unique[token] for token in sorted(unique)]}


def foreign(path: pathlib.Path) -> UserError:
    """For a file of tiktoken or of Mistral's tekken, which does not say all of what it takes to encode."""
    kind = "tekken" if path.suffix == ".json" else "tiktoken"
    return UserError(
        f"{path}: a {kind} file is not supported; use the tokenizer.json of the same model "
        "(transformers' AutoTokenizer.save_pretrained writes one)"
    )


def is_tekken(layout: Any) -> bool:
    """Whether it is the JSON of a tekken file, whatever its name."""
    return isinstance(layout, dict) and "model" not in layout and "pattern" in (layout.get("config") or ())


def is_foreign(content: bytes) -> bool:
    """Whether it looks like the lines of a tiktoken file: base64 and a rank."""
    first = content[:200].split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit() and len(first[0]) % 4 == 0


def _flags(token: str | dict[str, Any]) -> dict[str, Any]:
    return {"content": token, "special": True} if isinstance(token, str) else {**token, "special": True}


def _object(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the JSON of a tokenizer ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the JSON of a tokenizer (a {type(content).__name__})")
    return content


def _entry(token: AddedToken, given: dict[str, Any] | None = None) -> dict[str, Any]:
    given = given or {}
    flags = {flag: bool(given.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    return {"id": token.id, "content": token.content, **flags, "special": token.special}


def _whole(model: dict[str, Any], specials: list[AddedToken], **parts: Any) -> dict[str, Any]:
    empty = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    return {
        **empty,
        "added_tokens": [*map(_entry, sorted(specials, key=lambda token: token.id))],
        "model": model,
        **parts,
    }


def _word_piece(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    vocabulary = {piece: token for token, piece in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))}
    if "[UNK]" not in vocabulary:
        raise UserError(f"{path}: not the vocabulary of a WordPiece, which has a line [UNK]")
    named = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocabulary]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": bool(settings.get("tokenize_chinese_chars", True)),
        "strip_accents": settings.get("strip_accents"),
        "lowercase": bool(settings.get("do_lower_case", True)),
    }
    return _whole(
        model | {"max_input_chars_per_word": 100, "vocab": vocabulary},
        [AddedToken(vocabulary[name], name, True) for name in named],
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def _byte_level(folder: pathlib.Path, name: str, prefix: bool) -> dict[str, Any]:
    vocabulary = _object(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if not all(len(merge) == 2 for merge in merges):
        raise UserError(f"{folder / 'merges.txt'}: not the merges of a BPE, two pieces a line")
    usual = ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if name in ("RobertaTokenizer", "BartTokenizer") else ()
    specials = [
        AddedToken(vocabulary[token], token, True) for token in (*usual, "<|endoftext|>") if token in vocabulary
    ]
    letters = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    before: dict[str, Any] = {**letters, "use_regex": True}
    if name == "Qwen2Tokenizer":
        split = {"type": "Split", "pattern": {"Regex": word_cache.QWEN2}, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [split, {**letters, "use_regex": False}]}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": ""}
    return _whole(
        model
        | {"end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": merges},
        specials,
        normalizer={"type": "NFC"} if name == "Qwen2Tokenizer" else None,
        pre_tokenizer=before,
        decoder={**letters, "add_prefix_space": True, "use_regex": True},
    )
