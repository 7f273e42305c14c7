"""The texts of a tokenizer's tokens, and which tokens have none of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any


class TokenTexts:
    """A tokenizer of transformers, as far as the text of a reply needs it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        special = set(tokenizer.all_special_ids)
        if backend is not None:
            special |= {int(token) for token, each in tokenizer.added_tokens_decoder.items() if each.special}
        self.special = frozenset(special)
        """Ids that are left out of texts, unless they are asked for."""
        self.bytes = frozenset(_byte_tokens(tokenizer, backend)) - self.special
        """Ids of single bytes, which become characters only where a run of them is valid UTF-8 as a whole."""
        self.added: Mapping[str, int] = dict(tokenizer.get_added_vocab())
        """The ids of the tokens that were added to the vocabulary, special or not."""
        # Not by the vocabulary, of which every call makes a new dictionary.
        self._ids = {str(tokenizer.convert_ids_to_tokens(token)): token for token in self.special}

    def decode(self, ids: Sequence[int], *, shown: Set[int] = frozenset()) -> str:
        """The text of `ids`, without that of special tokens except for those in `shown`."""
        if shown:
            ids = [token for token in ids if token not in self.special or token in shown]
        if not any(self.has_text(token, shown=shown) for token in ids):
            # Some decoders of `tokenizers` panic where nothing is left.
            return ""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not shown, clean_up_tokenization_spaces=False)
        return text

    def has_text(self, token: int, *, shown: Set[int] = frozenset()) -> bool:
        """Whether a text shows the token: models often give logits for more ids than the tokenizer has."""
        if token in self.special and token not in shown:
            return False
        return self._tokenizer.convert_ids_to_tokens(token) is not None

    def name(self, token: int) -> str:
        """The text of one token as it is in the middle of a text: many decoders strip the space of the first one."""
        before = self.decode(self._anchor)
        both = self.decode([*self._anchor, token], shown=self.special)
        return both[len(before) :] if both.startswith(before) else self.decode([token], shown=self.special)

    def id_of(self, text: str) -> int | None:
        """The id of the special token that `text` is; None for all other texts."""
        return self._ids.get(text)

    @cached_property
    def _anchor(self) -> list[int]:
        """Some token with a text; none where there is no such token."""
        for token in range(len(self._tokenizer)):
            if token not in self.special and token not in self.bytes and self.decode([token]).strip().isalnum():
                return [token]
        return []


def _byte_tokens(tokenizer: Any, backend: Any) -> Iterator[int]:
    """The ids of tokens such as <0xE2>, where the tokenizer's decoder takes them for bytes."""
    if backend is not None and not _has(backend.decoder, "ByteFallback"):
        return
    vocabulary = tokenizer.get_vocab()
    for byte in range(256):
        token = vocabulary.get(f"<0x{byte:02X}>")
        if token is not None:
            yield token


def _has(decoder: Any, kind: str) -> bool:
    """Whether a decoder of `tokenizers`, or one of those that it consists of, is of `kind`."""
    left = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while left:
        each = left.pop()
        if each.get("type") == kind:
            return True
        left += each.get("decoders", [])
    return False
