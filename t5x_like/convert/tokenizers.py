"""The tokenizer of a model directory as files of Hugging Face.

Files that came with a converted model go back as they were. For one of ours, the settings beside its tokenizer.json or
SentencePiece model are written. Sentinels that a run put behind its tokenizer (config.data.extra_ids) get names there,
without which transformers would not have them.
"""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from t5x_like.convert.huggingface import TOKENIZER_FILES
from t5x_like.core.errors import UserError
from t5x_like.data.read.source_target import start_id
from t5x_like.data.templates.chat import Chat
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.storage import paths

_SETTINGS = "tokenizer_config.json"


def token_ids(folder: str, note: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens for a config.json: those that the model came with, else those of its vocabulary."""
    if note.get("token_ids"):
        return dict(note["token_ids"])
    if not paths.exists(folder):
        return {}
    with paths.local_copy(folder) as local:
        vocabulary = vocabularies.load(local)
    ids = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}
    start = note["config"].get("data", {}).get("start_token")
    if start is not None and note["config"]["model"]["architecture"] == "encoder_decoder":
        ids |= {"pad_token_id": 0, "decoder_start_token_id": start_id(start, vocabulary)}
    return ids


def generation(folder: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json says of a model of ours: `ids`, and where its tokenizer has a chat template also
    what ends a turn there, so that an answer ends with it."""
    found = {name: token for name, token in ids.items() if token is not None}
    if not paths.exists(folder):
        return found
    with paths.local_copy(folder) as local:
        vocabulary = vocabularies.load(local)
    if not vocabulary.chat_template:
        return found
    try:
        ends = Chat(vocabulary.chat_template, vocabulary, where=f"the chat template in {folder}").stop_ids()
    except UserError:  # one that takes no question and answer has no turn that ends
        return found
    return found | ({"eos_token_id": ends} if len(ends) > 1 else {})


def write(folder: str, target: str, *, name: str) -> None:
    """Puts the tokenizer in `folder`, if there is one, into a Hugging Face folder of the family `name`."""
    if not paths.exists(folder):
        return
    with paths.local_copy(folder) as local:
        found = [file for file in TOKENIZER_FILES if os.path.exists(os.path.join(local, file))]
        for file in found:
            shutil.copyfile(os.path.join(local, file), os.path.join(target, file))
        if name == "t5" and "tokenizer.model" in found and "spiece.model" not in found:
            os.rename(os.path.join(target, "tokenizer.model"), os.path.join(target, "spiece.model"))
        vocabulary = vocabularies.load(local)
        if "tokenizer.json" in found and vocabulary.unnamed_sentinels:
            _name_sentinels(os.path.join(target, "tokenizer.json"), vocabulary)
        if _SETTINGS not in found:
            paths.write_json_atomic(os.path.join(target, _SETTINGS), _settings(local, vocabulary, name))


def _name_sentinels(file: str, vocabulary: Vocabulary) -> None:
    """Adds to a tokenizer.json the sentinels that it lacks, as special tokens in the order of their ids."""
    layout = json.loads(paths.read_bytes(file))
    added = layout.get("added_tokens", []) + [{"id": token} | entry for token, entry in _sentinels(vocabulary).items()]
    paths.write_bytes_atomic(file, json.dumps(layout | {"added_tokens": added}, ensure_ascii=False).encode())


def _sentinels(vocabulary: Vocabulary) -> dict[int, dict[str, Any]]:
    """The added tokens of those that the tokenizer's own file does not name, by id."""
    # White space before one belongs to the words that it stands for (data/tokenizers/sentinels.py).
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    numbers = range(vocabulary.unnamed_sentinels)
    return {vocabulary.size - 1 - n: {"content": f"<extra_id_{n}>", **flags} for n in reversed(numbers)}


def _settings(folder: str, vocabulary: Vocabulary, name: str) -> dict[str, Any]:
    if vocabulary.kind == "bytes":
        settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "unk_token": "<unk>"}
        named = {str(token): entry for token, entry in _sentinels(vocabulary).items()}
        return settings | ({"added_tokens_decoder": named} if named else {})
    classes = {"t5": "T5Tokenizer"} if vocabulary.kind == "sentencepiece" else {}
    usual = "LlamaTokenizer" if vocabulary.kind == "sentencepiece" else "PreTrainedTokenizerFast"
    special = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id}
    named: dict[str, Any] = {
        field: _piece(folder, vocabulary, token) for field, token in special.items() if token is not None
    }
    if classes.get(name) == "T5Tokenizer":
        # The class adds 100 sentinels where nothing is said, and a piece for padding that the model does not have.
        named |= {"extra_ids": vocabulary.unnamed_sentinels, "pad_token": _piece(folder, vocabulary, 0)}
    return {"tokenizer_class": classes.get(name, usual), **named}


def _piece(folder: str, vocabulary: Vocabulary, token: int) -> str | None:
    """What a token is called in its file."""
    if vocabulary.kind == "sentencepiece":
        import sentencepiece

        model = paths.read_bytes(os.path.join(folder, "tokenizer.model"))
        return sentencepiece.SentencePieceProcessor(model_proto=model).id_to_piece(token)
    import tokenizers

    return tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json")).id_to_token(token)
