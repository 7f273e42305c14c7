"""`/v1/completions`: OpenAI's completions of texts and token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgemoe.results import LOWEST_LOGPROB, Chunk, Completion, TokenLogprob, named_lossy
from edgemoe.sampling import Sampling
from edgemoe.server.protocols import fields
from edgemoe.server.protocols.openai_chat import OpenAIReply, without_stream
from edgemoe.server.protocols.reply import ServedModel, Usage

MAX_PROMPTS = MAX_REPLIES = 2048
"""Prompts of one request, as OpenAI has it, and replies to all of them: each is a task of the event loop."""


class CompletionReply(OpenAIReply):
    """A request for texts that go on from prompts: `n` for each prompt, those of one prompt one after the other."""

    event_kind = "text_completion"

    def __init__(self, body: Mapping[str, Any], served: ServedModel) -> None:
        super().__init__(body, served, "cmpl")
        body = without_stream(body)
        fields.check(body, chat=False)
        if body.get("prompt") is None:
            raise fields.FieldError("prompt is missing: give a text, a list of texts, or token ids")
        sampling = Sampling(**fields.sampling_changes(body, chat=False))
        self.choices = fields.choices(body)
        asked = prompts(body["prompt"])
        if len(asked) * self.choices > MAX_REPLIES:
            raise fields.FieldError(
                f"n is {self.choices} for each of {len(asked)} prompts; give at most {MAX_REPLIES} replies in all"
            )
        samplings = fields.samplings(sampling, self.choices)
        self.asked = [(prompt, each) for prompt in asked for each in samplings]
        self._offsets: dict[int, int] = {}

    def chunk(self, index: int, chunk: Chunk) -> list[bytes]:
        """See the base class."""
        self.usages.setdefault(index, Usage()).add(chunk)
        if not chunk.text and chunk.logprobs is None and chunk.finish_reason is None and self.has_tokenizer:
            return []
        choice = self._choice(index, chunk, self._offsets.get(index, 0))
        if chunk.logprobs is not None:
            self._offsets[index] = self._offsets.get(index, 0) + sum(len(each.token) for each in chunk.logprobs)
        return [self.choice_event(choice)]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """See the base class."""
        self.usages = {index: Usage.of(completion) for index, completion in enumerate(completions)}
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        return self.head(self.event_kind) | {"choices": choices, "usage": self.usage()} | named_lossy(completions[0])

    def _choice(self, index: int, reply: Completion | Chunk, offset: int = 0) -> dict[str, Any]:
        return text_choice(index, reply, has_tokenizer=self.has_tokenizer, offset=offset)


def prompts(value: Any) -> list[str | tuple[int, ...]]:
    """The prompts of a request: a text, token ids, or a list of either. Raises FieldError."""
    if not isinstance(value, list) or not value or isinstance(value[0], int):
        return [fields.prompt(value)]
    if len(value) > MAX_PROMPTS:
        raise fields.FieldError(f"prompt has {len(value)} prompts; give at most {MAX_PROMPTS}")
    return [fields.prompt(each) for each in value]


def text_choice(
    index: int, reply: Completion | Chunk, *, has_tokenizer: bool = True, offset: int = 0
) -> dict[str, Any]:
    """A reply, or a piece of one, as a choice of OpenAI's `text_completion`; without a tokenizer it has token ids.

    `offset` is the length of the text before, in characters.
    """
    choice = {"index": index, "text": reply.text, "finish_reason": reply.finish_reason, "logprobs": None}
    if reply.logprobs is not None:
        choice["logprobs"] = completion_logprobs(reply.logprobs, offset)
    if not has_tokenizer:
        choice["token_ids"] = list(reply.token_ids)
    return choice


def completion_logprobs(entries: Iterable[TokenLogprob], offset: int = 0) -> dict[str, list[Any]]:
    """Log-probabilities in the shape of a choice of `text_completion`."""
    shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        names = _names(entry)
        shape["tokens"].append(names[entry.token_id])
        shape["token_logprobs"].append(max(entry.logprob, LOWEST_LOGPROB))
        shape["top_logprobs"].append({names[token]: max(value, LOWEST_LOGPROB) for token, _, value in entry.top})
        shape["text_offset"].append(offset)
        offset += len(entry.token)
    return shape


def _names(entry: TokenLogprob) -> dict[int, str]:
    """What each token is called: its text, or its id where another one has the same text, as parts of characters do."""
    texts = {token_id: text for token_id, text, _ in entry.top} | {entry.token_id: entry.token}
    count = Counter(texts.values())
    return {token_id: text if count[text] == 1 else f"token_id:{token_id}" for token_id, text in texts.items()}
