"""A checkpoint's tokenizer and vocabulary, through transformers, and the token ids of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from edgemoe.checkpoint.chat_template import ChatPrompt, Messages
from edgemoe.checkpoint.checkpoint import Checkpoint
from edgemoe.checkpoint.foreign.text_length import check_text_length
from edgemoe.checkpoint.foreign.tokenizer_values import check_tokenizer_files, has_vocabulary_files
from edgemoe.checkpoint.gguf.gguf_tokenizer import tokenizer_of
from edgemoe.checkpoint.prompts.token_ids import check_token_ids, read_token_ids
from edgemoe.errors import CheckpointError, RequestError, told_as
from edgemoe.quiet import quiet_transformers
from edgemoe.values import check_text


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model."""

    model: str
    """Its name, for messages."""
    tokenizer: Any
    """None without tokenizer files."""
    size: int
    """The number of ids that the model predicts."""

    def check_same(self, other: Vocabulary) -> None:
        """Raises CheckpointError unless `other` has the same ids with the same meaning."""
        if self.size != other.size or self._ids_by_token() != other._ids_by_token():
            raise CheckpointError(
                f"{other.model} has another vocabulary than {self.model}, so that their predictions cannot be "
                f"compared: give a checkpoint with the same tokenizer as against="
            )

    def _ids_by_token(self) -> object:
        return None if self.tokenizer is None else self.tokenizer.get_vocab()


Prompt = str | Sequence[int] | Messages | ChatPrompt
"""A text or token ids to continue, or a conversation to reply to."""


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in the checkpoint's folder; None without tokenizer files. Never runs code from the folder.

    Raises CheckpointError if it cannot be loaded.
    """
    if not checkpoint.has_tokenizer:
        return None
    from transformers import AutoTokenizer

    if checkpoint.gguf is not None:
        file = checkpoint.gguf
        with (
            quiet_transformers(),
            told_as(lambda why: CheckpointError(f"the tokenizer in {checkpoint.name} cannot be built ({why})")),
        ):
            return tokenizer_of(file)

    def unusable(why: str) -> CheckpointError:
        known = (
            why if has_vocabulary_files(checkpoint.folder) else "its folder has no tokenizer.json or tokenizer.model"
        )
        return CheckpointError(
            f"the tokenizer in {checkpoint.folder} cannot be loaded ({known}): fetch it again, or remove its files to "
            "work with token ids"
        )

    check_tokenizer_files(checkpoint.folder)
    with quiet_transformers(), told_as(unusable, of_files=True):
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)


def as_chat(prompt: Prompt) -> ChatPrompt | None:
    """`prompt` where it is a conversation; None for a text, for token ids, and for what is no prompt."""
    if isinstance(prompt, ChatPrompt):
        return prompt
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        return ChatPrompt(cast(Messages, prompt))
    return None


def prompt_tokens(tokenizer: Any, prompt: str | Sequence[int], name: str, context: int | None = None) -> list[int]:
    """The token ids of a text, or those that are given, for the model called `name`.

    A prompt that is longer than `context` tokens allow need not be read. Raises RequestError for a text without a
    tokenizer, for one that it cannot read, and for what is no prompt.
    """
    if not isinstance(prompt, str):
        return read_token_ids(prompt, context)
    if tokenizer is None:
        raise RequestError(f"{name} has no tokenizer files: give the prompt as token ids")
    check_text(prompt, "the prompt")
    unread = f"the tokenizer of {name} cannot read the prompt"
    with quiet_transformers(), told_as(lambda why: RequestError(f"{unread} ({why}): give another text, or token ids")):
        check_text_length(prompt, context, tokenizer)
        return [int(token) for token in tokenizer.encode(prompt)] if prompt else []


def check_prompt(tokens: Sequence[int], vocabulary: int) -> None:
    """Raises RequestError for an empty prompt, and for an id that is none of `vocabulary` ids."""
    if not tokens:
        raise RequestError("the prompt is empty: give at least one token")
    check_token_ids(tokens, vocabulary, "the prompt has the")
