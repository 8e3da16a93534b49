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
MADE_OF_MODEL = ("", "LlamaTokenizer", "CodeLlamaTokenizer", "T5Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_WORD_PIECE = ("", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
_BYTE_LEVEL = ("", "GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "Qwen2Tokenizer")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_REMEDY = "load it with transformers and save_pretrained it, so that it has a tokenizer.json"


class Folder:
    """What the settings of a folder say. Raises UserError, which names the file, for settings that are none."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.settings = _object(path / SETTINGS)
        self.tokenizer_class = str(self.settings.get("tokenizer_class") or "").removesuffix("Fast")
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
                if not special and (entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word")):
                    raise UserError(
                        f"{self.path / SETTINGS}: the added token {entry['content']!r} takes white space with it "
                        f"(lstrip, rstrip or single_word), which is not supported; {_REMEDY}"
                    )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: its added tokens are not {{text: id}} ({error!r})") from None
        return [AddedToken(token, content, special) for token, (content, special) in sorted(found.items())]

    def refuse_class(self, file: str, known: tuple[str, ...]) -> None:
        """UserError where the class gives other ids than the file alone."""
        if self.tokenizer_class not in known:
            raise UserError(
                f"{self.path / SETTINGS}: a {self.tokenizer_class} made of {file} is not supported "
                f"(known: {', '.join(filter(None, known))}); {_REMEDY}"
            )

    def model(self) -> pathlib.Path | None:
        """Its SentencePiece model, if it has one."""
        models = sorted(self.path.glob("*.model"))
        if len(models) > 1:
            raise UserError(f"tokenizer {self.path}: has {len(models)} *.model; give the path of one of them")
        if models:
            self.refuse_class(models[0].name, MADE_OF_MODEL)
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
        for name in ("tekken.json", *(path.name for path in sorted(self.path.glob("*.tiktoken")))):
            if (self.path / name).is_file():
                raise foreign(self.path / name)
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
        whole = [*layout.get("added_tokens", []), *map(_entry, missing)]
        unique = {entry["id"]: entry for entry in whole}
        return layout | {"added_tokens": [unique[token] for token in sorted(unique)]}


def foreign(path: pathlib.Path) -> UserError:
    """For a file of tiktoken or of Mistral's tekken, which does not say all of what it takes to encode."""
    kind = "tekken" if path.suffix == ".json" else "tiktoken"
    return UserError(
        f"{path}: a {kind} file is not supported; use the tokenizer.json of the same model "
        "(transformers' AutoTokenizer.save_pretrained writes one)"
    )


def is_foreign(content: bytes) -> bool:
    """Whether it looks like the lines of a tiktoken file: base64 and a rank."""
    first = content[:200].split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit() and len(first[0]) % 4 == 0


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


def _entry(token: AddedToken) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
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
