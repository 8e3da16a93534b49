"""Vocabularies: text <-> token ids, and how many bytes of source text each token stands for.

Where the surfaces of tokens add up to the text (byte-level BPE, byte fallback), counting bytes is a table look-up and
decoding is a join; otherwise offsets in the text are used. Formats of tokenizers: data/tokenizers/tokenizer_files.py;
training one: data/tokenizers/tokenizer_training.py.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import cuts, folders, rebuilt, sentencepiece_engine, tokenizer_files, tokenizers_engine
from t5x_like.data.tokenizers.added_tokens import AddedToken
from t5x_like.data.tokenizers.folders import Folder
from t5x_like.data.tokenizers.tokenizer_files import TokenizerFile
from t5x_like.storage import paths

SETTINGS = "vocabulary.json"  # in a saved folder: kind, file and special ids
_UNKNOWN_BYTES = -(1 << 40)  # surface length of a token whose surface depends on the text: forces the offsets
_UNKNOWN_TEXT = " \u2047 ".encode()  # what SentencePiece decodes an unknown piece to
_HARD_TEXTS = (  # case, spaces, ends of lines, forms of one character, scripts and signs, what spells a special token
    *("Aa", "a  b", " a", "a ", "a\n\nb", "a\tb", "\r\n", "\u00e9", "e\u0301", "\ufb01", "\u3000a", "\u732b\u3042"),
    *("\u0436\u0627", "\U0001f600", "\x01", "\u00a0", "</s><|endoftext|>[UNK]"),
)


class Vocabulary:
    """A tokenizer with its special ids; `size`: all ids are below it.

    `extra_ids` sentinels are the last ids: <extra_id_0> is size - 1, <extra_id_1> the id below it, as in T5; they
    stand for no text. Padding is id 0 for every tokenizer and is told by segment ids, never by its value: 0 is a
    padding token in `bytes` and in T5's models, <unk> in trained SentencePiece models, <|endoftext|> in a trained BPE,
    and the piece of a byte in a trained unigram. EOS is 1 in `bytes` and T5's models.

    `specials`: {name: id} of the tokens that no text gives. `chat_template`: Jinja, how conversations are written
    (data/templates); "" for none. It is no part of what encode and decode are.
    """

    def __init__(self, file: TokenizerFile, chat_template: str = ""):
        self.specials, self.chat_template = dict(file.specials), chat_template
        self._file, self._engine, self._surfaces = file, file.engine, file.surfaces
        self.kind, self.size = file.kind, len(file.surfaces)
        self.bos_id, self.eos_id = file.bos_id, file.eos_id
        self.extra_ids = file.extra_ids + file.named_sentinels

    def with_extra_ids(self, count: int) -> "Vocabulary":
        """The same tokenizer with `count` sentinels at its end. UserError when it has others."""
        if count in (0, self.extra_ids):
            return self
        if self._file.hides_sentinels:
            raise UserError(
                "the tokenizer has <extra_id_0> of its own, and not as its last id, where span corruption looks for "
                f"it; {count} others behind it would not be those that its model knows; set extra_ids=0"
            )
        if self.extra_ids:
            raise UserError(f"the tokenizer has {self.extra_ids} extra ids of its own, not {count}; set extra_ids=0")
        surfaces = (*self._surfaces, *(b"",) * count)
        return Vocabulary(dataclasses.replace(self._file, surfaces=surfaces, extra_ids=count), self.chat_template)

    @property
    def unnamed_sentinels(self) -> int:
        """How many of `extra_ids`, which are the last ids, the tokenizer's own file does not name."""
        return self._file.extra_ids

    def with_chat_template(self, text: str) -> "Vocabulary":
        return Vocabulary(self._file, text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal exactly when encode and decode are the same functions; 64 hexadecimal digits."""
        digest = hashlib.sha256(self._file.content)
        digest.update(json.dumps([self.kind, self.bos_id, self.eos_id, self._file.extra_ids]).encode())
        if self._file.added:
            digest.update(json.dumps([self._file.added, self._file.legacy]).encode())
        return digest.hexdigest()

    @functools.cached_property
    def cuts(self) -> str:
        """A pattern of the places where a text may be cut in two without other ids, "" for none."""
        lines_are_spaces = self.encode("a\nb") == self.encode("a b")
        return "" if self._file.cuts == cuts.BETWEEN_LINES and lines_are_spaces else self._file.cuts

    @property
    def rounds(self) -> bool:
        """Whether the library adds up rounded scores along a text: near ties then depend on where it begins."""
        return self._file.rounds

    @functools.cached_property
    def _surface_bytes(self) -> np.ndarray:
        return np.array([_UNKNOWN_BYTES if s is None else len(s) for s in self._surfaces], np.int64)

    @functools.cached_property
    def _begins_with_space(self) -> np.ndarray:
        return np.array([s is not None and s.startswith(b" ") for s in self._surfaces], bool)

    @functools.cached_property
    def adds_space(self) -> bool:
        """Whether encoding puts a space before the text (SentencePiece's dummy prefix)."""
        return self._join(self._engine.encode(["a"])[0]) == b" a"

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text; `bos` and `eos` add those tokens where the vocabulary has them."""
        before = [self.bos_id] if bos and self.bos_id is not None else []
        after = [self.eos_id] if eos and self.eos_id is not None else []
        return [*before, *self._engine.encode([text])[0], *after]

    def one_token(self, text: str) -> int | None:
        """The token that a text is, a special one among them; None for a text of several or of none."""
        ids = [self.specials[text]] if text in self.specials else self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole document; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        ids = [int(token) for token in ids]
        decoded = self._engine.decode(ids)
        if decoded is not None:
            return decoded
        joined = self._join(ids)
        return (joined.removeprefix(b" ") if self.adds_space else joined).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of a continuation: of two parts they are the parts' bytes joined, so text can be streamed.

        Only for vocabularies whose surfaces are exact; others raise UserError (use `decode` on the whole).
        """
        if not self.exact:
            raise UserError(f"{self._file.name}: tokens of this tokenizer have no bytes of their own")
        return self._join([int(token) for token in ids])

    @functools.cached_property
    def exact(self) -> bool:
        """Whether decoding is joining surfaces."""
        return self._engine.decode([]) is None

    @functools.cached_property
    def loses(self) -> str:
        """The first of some texts that does not come back, as "'A' becomes 'a'"; "" where all do: lossless."""
        for text in (*_HARD_TEXTS, *(f"a {token} b{token}c" for token in self._file.found)):
            again = self.decode(self.encode(text))
            if again != text:
                return f"{text!a} becomes {again!a}"
        return ""

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "tokens"], Int[np.ndarray, "texts"]]:
        """All ids one after the other, and the number of ids of each text; no special tokens."""
        encoded = self._engine.encode(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        flat: list[int] = []
        for ids in encoded:
            flat += ids
        return np.array(flat, np.int32), lengths

    def encode_parts(self, parts: Sequence[str | int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a text in which special tokens stand: (ids, bytes of text of each, byte of the text where each begins).

        `parts`: texts, and the ids of special tokens between them, which are spelled out in the text that places count
        bytes of, and stand for none.
        """
        names = {token: name for name, token in self.specials.items()}
        ids: list[int] = []
        counts: list[int] = []
        begins: list[int] = []
        place = 0
        for part, (found, widths) in zip(parts, self._engine.encode_parts(parts), strict=True):
            if isinstance(part, int):
                found, size = [part], len(names[part].encode())
                widths, starts = [0], [place]
            else:
                size = len(part.encode())
                first = place + size - sum(widths)  # what a special token takes with it is before
                starts = (first + np.cumsum(widths) - widths).tolist() if widths else []
            ids, counts, begins = ids + found, counts + widths, begins + starts
            place += size
        return np.array(ids, np.int32), np.array(counts, np.int64), np.array(begins, np.int64)

    def count_bytes(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray) -> Int[np.ndarray, "tokens"]:
        """UTF-8 bytes of its text that each token of `encode_batch(texts)` stands for; they add up to the text.

        A space that encoding put before the text counts 0. Where surfaces do not add up, offsets decide.
        """
        counts = self._surface_bytes[ids]
        begins = np.cumsum(lengths) - lengths
        totals = np.concatenate([[0], np.cumsum(counts)])
        surplus = totals[begins + lengths] - totals[begins] - [len(text.encode()) for text in texts]
        right = surplus == 0
        if self.adds_space:
            right &= [text.startswith(" ") for text in texts]  # then a missing byte made up for the space
            first = begins[(surplus == 1) & (lengths > 0)]
            added = first[self._begins_with_space[ids[first]]]
            counts[added] -= 1
            right |= np.isin(begins, added)
        for index in np.flatnonzero(~right & (lengths > 0)):
            counts[begins[index] : begins[index] + lengths[index]] = self._engine.count_bytes(texts[int(index)])
        return counts

    def decoded_bytes(self, ids: np.ndarray) -> Int[np.ndarray, "tokens"]:
        """Bytes that each id adds to `decode(ids)`: for tokens whose text is not at hand."""
        counts = self._surface_bytes[ids]
        counts[counts < 0] = len(_UNKNOWN_TEXT)
        if len(ids) and self.adds_space and self._begins_with_space[ids[0]]:
            counts[0] -= 1
        return counts

    def save(self, directory: str) -> None:
        """Writes the tokenizer's own file and `vocabulary.json`, which `load(directory)` reads."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "kind": self.kind,
            "file": self._file.name,
            "size": self.size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "extra_ids": self._file.extra_ids,
            "sha256": hashlib.sha256(self._file.content).hexdigest(),
            "fingerprint": self.fingerprint,
        } | ({"added": self._file.added, "legacy": self._file.legacy} if self._file.added else {})
        if self._file.name:
            paths.write_bytes_atomic(str(folder / self._file.name), self._file.content)
        if self.chat_template:
            paths.write_text_atomic(str(folder / folders.CHAT_TEMPLATE), self.chat_template)
        paths.write_json_atomic(str(folder / SETTINGS), settings)

    def _join(self, ids: Sequence[int]) -> bytes:
        known = (self._surfaces[token] for token in ids if 0 <= token < self.size)
        return b"".join(_UNKNOWN_TEXT if surface is None else surface for surface in known)


def load(path: str) -> Vocabulary:
    """`bytes`, a tokenizer file, or a folder with one (a `tokenizer/` folder of a workdir, or Hugging Face's)."""
    if path == "bytes":
        return Vocabulary(tokenizer_files.read_bytes(extra_ids=0))
    place = pathlib.Path(path)
    found = _load_folder(place) if place.is_dir() else _load_file(place)
    template = Folder(place if place.is_dir() else place.parent).chat_template
    return found.with_chat_template(template) if template else found


def _load_file(place: pathlib.Path) -> Vocabulary:
    if not place.is_file():
        raise UserError(f"tokenizer {place}: no such file; give a tokenizer.json, a SentencePiece model or 'bytes'")
    content = place.read_bytes()
    folder = Folder(place.parent)
    if content.lstrip()[:1] == b"{":
        return _of_layout(content, place, folder)
    if place.suffix == ".tiktoken" or folders.is_foreign(content):
        raise folders.foreign(place)
    return _of_model(content, place, folder)


def _load_folder(path: pathlib.Path) -> Vocabulary:
    if (path / SETTINGS).is_file():
        return _load_saved(path)
    if (path / "tokenizer.json").is_file():
        return load(str(path / "tokenizer.json"))
    folder = Folder(path, of_model=True)
    model = folder.model()
    if model is not None and folder.tokenizer_class:
        made, names = rebuilt.layout(folder, model)
        content = json.dumps(made, ensure_ascii=False).encode()
        return Vocabulary(tokenizers_engine.read(content, path / "tokenizer.json", names))
    if model is not None:
        return load(str(model))
    layout = folder.layout()
    if layout is not None:
        return _of_layout(json.dumps(layout, ensure_ascii=False).encode(), path / "tokenizer.json", folder)
    extra_ids = _of_bytes(path / folders.SETTINGS)
    if extra_ids is not None:
        return load("bytes").with_extra_ids(extra_ids)
    raise UserError(
        f"tokenizer {path}: needs {SETTINGS}, tokenizer.json, one *.model, vocab.txt, or vocab.json and merges.txt"
    )


def _of_layout(content: bytes, place: pathlib.Path, folder: Folder) -> Vocabulary:
    """Of a tokenizer.json; its bytes are kept where the files beside it add nothing."""
    names = folder.names
    try:
        layout = json.loads(content)
        if folders.is_tekken(layout):
            raise folders.foreign(place)
        whole = folder.complete(layout)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Vocabulary(tokenizers_engine.read(content, place, names))  # which says what is wrong
    if whole is not layout:
        content = json.dumps(whole, ensure_ascii=False).encode()
    return Vocabulary(tokenizers_engine.read(content, place, names))


def _of_model(content: bytes, place: pathlib.Path, folder: Folder) -> Vocabulary:
    """Of a SentencePiece model with what the files beside it say."""
    folder.refuse_class(place.name, folders.MADE_OF_MODEL)
    sentinels = folder.sentinels()
    given = folder.added()
    folder.refuse_white_space()
    added = [token for token in given if not (sentinels and token.content.startswith("<extra_id_"))]
    legacy = bool(folder.settings.get("legacy", False))
    file = sentencepiece_engine.read(content, place, extra_ids=0, added=added, legacy=legacy)
    if sentinels and not file.named_sentinels:
        if file.added:
            raise UserError(f"{folder.path}: a T5Tokenizer with added tokens beside its sentinels is not supported")
        file = sentencepiece_engine.read(content, place, extra_ids=sentinels)
    if folder.names != (None, None):
        ids = sentencepiece_engine.token_ids(file, content, place)
        bos, eos = (tokenizers_engine.named_token(ids, name, place) for name in folder.names)
        bos, eos = file.bos_id if bos is None else bos, file.eos_id if eos is None else eos
        file = dataclasses.replace(file, bos_id=None if bos == eos else bos, eos_id=eos)
    return Vocabulary(file)


def _of_bytes(settings: pathlib.Path) -> int | None:
    """The sentinels of a folder of Hugging Face that has the tokenizer of bytes, which has no other file; None for
    another folder, and for the class's own sentinels (`extra_ids`), whose first is <extra_id_0>."""
    try:
        content = json.loads(settings.read_text())
        if content["tokenizer_class"] != "ByT5Tokenizer" or content["extra_ids"] != 0:
            return None
        named = {int(token): entry["content"] for token, entry in content.get("added_tokens_decoder", {}).items()}
        return tokenizer_files.named_sentinels(lambda token: named.get(token, ""), max(named, default=-1) + 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _load_saved(folder: pathlib.Path) -> Vocabulary:
    where = folder / SETTINGS
    try:
        settings = json.loads(where.read_text())
        kind, name = settings["kind"], settings["file"]
        content = (folder / name).read_bytes() if name else b""
        if hashlib.sha256(content).hexdigest() != settings["sha256"]:
            raise UserError(f"{folder / name}: its sha256 is not the one in {where}; copy the folder again")
        if kind == "bytes":
            return Vocabulary(tokenizer_files.read_bytes(extra_ids=settings["extra_ids"]))
        if kind == "sentencepiece":
            more = {
                "extra_ids": settings["extra_ids"],
                "added": [AddedToken(*token) for token in settings.get("added", [])],
                "legacy": settings.get("legacy", False),
            }
            file = sentencepiece_engine.read(content, folder / name, **more)
            return Vocabulary(dataclasses.replace(file, bos_id=settings["bos_id"], eos_id=settings["eos_id"]))
        file = tokenizers_engine.read(content, folder / name, (None, None))
        named = dataclasses.replace(file, bos_id=settings["bos_id"], eos_id=settings["eos_id"])
        return Vocabulary(named).with_extra_ids(settings["extra_ids"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a saved vocabulary ({error}); copy the folder again") from None
