"""A small world of conversations for the tests: messages, a tokenizer with the special tokens of chat templates."""

import json

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from tests.data import corpus

SPECIALS = ("<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>")
SPECIALS += ("<|eot_id|>",)
SHORT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi! How are you"}]
LONG = [
    {"role": "system", "content": "You are terse.\n"},
    {"role": "user", "content": "  Wie h\u00e4lt\n\nsich das? \U0001f600 "},
    {"role": "assistant", "content": "Gut, danke."},
    {"role": "user", "content": "<|endoftex|> and 1234"},
    {"role": "assistant", "content": " - one\n - two \u543e\u8f29\u306f\n"},
]
# Two turns of the assistant in a row, and one that says nothing.
ODD = [
    *SHORT,
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "x"},
]
CONVERSATIONS = [SHORT, LONG, ODD]


def folder(path, template=""):
    """A Hugging Face folder of a byte-level BPE with these special tokens; `template`: its chat template."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for conversation in CONVERSATIONS for message in conversation]
    tokenizer.train_from_iterator([*corpus.paragraphs(40), *texts], trainer)
    path.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    settings |= {"pad_token": "<|endoftext|>"} | ({"chat_template": template} if template else {})
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def write(path, conversations, name="messages"):
    path.write_text("".join(json.dumps({name: conversation}) + "\n" for conversation in conversations))
    return f"jsonl:{path}"
