"""A checkpoint's tokenizer, vocabulary, chat template and generation defaults, through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from edgemoe.checkpoint.checkpoint import Checkpoint
from edgemoe.errors import CheckpointError, RequestError, is_device_or_memory_error, reason
from edgemoe.quiet import quiet_transformers


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


Messages = Sequence[Mapping[str, str]]
"""A conversation: each message has a role and a content."""
Prompt = str | Sequence[int] | Messages
"""A text or token ids to continue, or a conversation to reply to."""


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in the checkpoint's folder; None without tokenizer files. Never runs code from the folder.

    Raises CheckpointError if it cannot be loaded.
    """
    if not checkpoint.has_tokenizer:
        return None
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            if is_device_or_memory_error(error) and not isinstance(error, OSError):
                raise
            raise CheckpointError(
                f"the tokenizer in {checkpoint.folder} cannot be loaded ({reason(error)}): fetch it again, or remove "
                "its files to work with token ids"
            ) from error


def prompt_tokens(tokenizer: Any, prompt: Prompt, vocabulary: int, name: str) -> list[int]:
    """The token ids of `prompt` for the model called `name`, which has `vocabulary` ids.

    Raises RequestError for an empty prompt, an unknown id, a text without a tokenizer, and a conversation that
    `render_chat` refuses.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(f"{name} has no tokenizer files: give the prompt as token ids")
        with quiet_transformers():
            tokens = [int(token) for token in tokenizer.encode(prompt)] if prompt else []
    elif any(isinstance(part, Mapping) for part in prompt):
        tokens = render_chat(tokenizer, cast(Messages, prompt), name)
    else:
        tokens = [int(token) for token in cast(Sequence[int], prompt)]
    if not tokens:
        raise RequestError("the prompt is empty: give at least one token")
    outside = [token for token in tokens if not 0 <= token < vocabulary]
    if outside:
        raise RequestError(f"token id {outside[0]} is outside the vocabulary of {vocabulary}: check the ids")
    return tokens


def render_chat(tokenizer: Any, messages: Messages, name: str) -> list[int]:
    """The token ids of `messages` in the checkpoint's chat template, up to where the assistant's reply begins.

    Raises RequestError without a chat template, and for messages that are malformed or refused by the template.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError(f"{name} has no chat template: give plain prompts, as with edgemoe run")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise RequestError(f"a message must have a text role and a text content, not {dict(message)!r}")
    if not messages:
        raise RequestError("the conversation is empty: give at least one message")
    try:
        with quiet_transformers():
            rendered = tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
    except Exception as error:
        if is_device_or_memory_error(error):
            raise
        raise RequestError(f"the chat template of {name} refuses this conversation: {reason(error)}") from error
    return [int(token) for token in rendered["input_ids"]]
