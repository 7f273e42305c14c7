"""A tokenizer for the zoo's checkpoints, whose weights are random: every byte is a token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(merge: tuple[str, str] | None = None) -> Tokenizer:
    """A tokenizer whose token 3 + b is the byte b; 0, 1 and 2 are <pad>, <bos> and <eos>.

    With a `merge` of two letters, which llama.cpp needs, they are one more token, 259.
    """
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in alphabet]
    names = {byte: chr(byte) for byte in alphabet} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {names[byte]: 3 + byte for byte in range(256)}
    if merge is not None:
        vocabulary["".join(merge)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[] if merge is None else [merge]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_tokenizer(folder: Path, template: str | None = TEMPLATE, merge: tuple[str, str] | None = None) -> Path:
    """Puts the byte tokenizer beside the weights in `folder`."""
    from transformers import PreTrainedTokenizerFast

    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(merge), chat_template=template, **tokens)
    wrapped.save_pretrained(folder)
    return folder
