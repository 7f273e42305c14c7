"""One request from prompt to reply: sampling, detokenizing, stopping, timing. The scheduler feeds it with logits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from edgemoe.errors import RequestError
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.pass_logits import LogitsRow, LogitsRows, on_host
from edgemoe.request.reply_parts import Piece
from edgemoe.request.reply_text import ReplyText
from edgemoe.request.sampler import Sampler
from edgemoe.request.token_key import token_key
from edgemoe.results import Chunk, Timings, TokenLogprob
from edgemoe.sampling import ResolvedSampling


class Request:
    """The state of one request, from its submission to its last chunk."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        settings: ResolvedSampling,
        text: ReplyText,
        vocabulary: int,
    ) -> None:
        """`number` identifies the request; `text` is that of its reply.

        `vocabulary` is the number of tokens that logits are given for.
        """
        self.number = number
        self.tokens = list(prompt)
        """Prompt and reply. The KV cache holds the first of them, the others are not computed yet."""
        self.key = token_key(prompt)
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + settings.max_tokens
        """Tokens of the prompt and the longest reply."""
        self.cache: SequenceCache | None = None
        """Its KV cache; None while it waits."""
        self.chunks: deque[Chunk] = deque()
        """The reply, one chunk per token, for the consumer to take. The last one has the finish reason."""
        self.holder: object = None
        """Kept for the engine: tells it when no caller has the reply any more."""
        self.error: BaseException | None = None
        """The error that ended it, for the consumer to raise."""
        self.shared_tokens = 0
        """Tokens that were in its KV cache when it began, computed for other requests."""
        self.lossy = False
        """Whether its KV cache has tokens that were computed under an expert budget."""
        self._settings = settings
        self._text = text
        self._sampler = Sampler(settings, len(prompt), vocabulary)
        self._vocabulary = vocabulary
        self._constraint = text.constraint
        self.ends = settings.eos | text.ends
        """The token ids that end the reply."""
        self._reason: str | None = None
        self._submitted = time.perf_counter()
        self._begun_at = 0.0
        self._first_at = 0.0
        self._hits = self._misses = self._bytes_loaded = 0.0
        self.cycles = 0
        """Verifications of its drafts."""
        self._drafted = self._accepted = 0

    @property
    def uncomputed(self) -> int:
        """The number of its tokens that are not in its KV cache yet."""
        return len(self.tokens) - (self.cache.tokens if self.cache is not None else 0)

    @property
    def finished(self) -> bool:
        """Whether it has its last chunk, or its error."""
        return self._reason is not None or self.error is not None

    @property
    def begun(self) -> bool:
        """Whether it has ever been admitted, also if it was preempted since."""
        return bool(self._begun_at)

    @property
    def generated(self) -> int:
        """The number of tokens of the reply so far."""
        return len(self.tokens) - self.prompt_length

    def begin(self, cache: SequenceCache) -> None:
        """Starts it, or resumes it after a preemption. `cache` is its own, and may hold the first of its tokens."""
        self.cache = cache
        if not self.begun:
            self._begun_at = time.perf_counter()
            self.shared_tokens = cache.tokens

    def release_cache(self) -> SequenceCache:
        """Hands its KV cache to the caller; it keeps its tokens. It must have a cache."""
        cache, self.cache = self.cache, None
        assert cache is not None
        return cache

    def account(self, hits: float, misses: float, nbytes: float) -> None:
        """Adds its share of a step's cache hits, misses and loaded bytes to its timings."""
        self._hits += hits
        self._misses += misses
        self._bytes_loaded += nbytes

    def advance(self, logits: LogitsRow) -> None:
        """Samples the next token from `logits`, and adds its chunk.

        Logits that are not finite, and a form that cannot be followed, end it with an error.
        """
        try:
            self._append(self._draw(logits), logits)
        except RequestError as error:
            self.fail(error)

    def verify(self, tree: DraftTree, logits: LogitsRows) -> list[int]:
        """Samples along `tree`, whose root is the last token, until a token is not in the tree, and adds the chunks.

        `logits` are those after each node. Tokens are sampled as by `advance`, so the reply is the same without the
        tree. Returns the nodes whose tokens are in the reply, root first: those to keep in the KV cache. Logits that
        are not finite end it with an error.
        """
        path = [0]
        self.cycles += 1
        self._drafted += tree.drafted
        try:
            while True:
                after = logits[path[-1]]
                token = self._draw(after)
                child = tree.child(path[-1], token)
                if child is not None:
                    self._accepted += 1
                    path.append(child)
                self._append(token, after)
                if child is None or self.finished:
                    return path
        except RequestError as error:
            self.fail(error)
            return path

    def candidates(self, tree: DraftTree, node: int, logits: LogitsRow, count: int) -> list[tuple[int, float]]:
        """The `count` most probable samples after `node`, most probable first: tokens and probabilities.

        `logits` are a drafter's. The probabilities are the softmax of the sampler's scores, with
        the noise that the next sample will use; tokens of probability 0 are left out.
        """
        drafted, allowed = tree.text(node), None
        if self._constraint is not None:
            allowed = self._allowed_after(drafted)
            if allowed is None:
                return []
        return self._sampler.candidates(self.tokens + drafted, logits, count, ahead=tree.depths[node], allowed=allowed)

    def cancel(self) -> None:
        """Ends it with the reply so far, unless it has ended. What a pass gives it afterwards is not for it."""
        if self.finished:
            return
        self._reason = "cancelled"
        self._add(self._text.finish(), (), None)

    def fail(self, error: BaseException) -> None:
        """Ends it with `error`, unless it has ended."""
        if not self.finished:
            self.error = error

    def _draw(self, logits: LogitsRow) -> int:
        if self._constraint is None:
            return self._sampler.draw(self.tokens, logits)
        return self._sampler.draw(self.tokens, logits, self._constraint.allowed(self._vocabulary, self.ends))

    def _allowed_after(self, drafted: Sequence[int]) -> torch.Tensor | None:
        """Which tokens the grammar allows after `drafted`; None where there is none, or it cannot be told."""
        assert self._constraint is not None
        try:
            return self._constraint.allowed_after(drafted, self._vocabulary, self.ends)
        except RequestError:
            # The reply itself will tell, if it comes to that.
            return None

    def _append(self, token: int, logits: LogitsRow) -> None:
        self._first_at = self._first_at or time.perf_counter()
        self.tokens.append(token)
        self._reason, piece = self._follow(token)
        self._add(piece, (token,), self._logprobs(token, logits))

    def _follow(self, token: int) -> tuple[str | None, Piece]:
        """The finish reason if the reply ends after `token`, and the text that can be released."""
        if token in self.ends:
            return "stop", self._text.finish()
        piece = self._text.push(token)
        if self._text.stopped:
            return "stop", piece
        if self._constraint is not None:
            self._constraint.accept(token)
            if self._constraint.complete:
                return "stop", piece.joined(self._text.finish())
        if len(self.tokens) >= self.max_length:
            piece = piece.joined(self._text.finish())
            return ("stop" if self._text.stopped else "length"), piece
        return None, piece

    def _logprobs(self, token: int, logits: LogitsRow) -> tuple[TokenLogprob, ...] | None:
        count = self._settings.logprobs
        if count is None:
            return None
        values = on_host(logits).log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        best = values.topk(min(count, len(values)))
        name = self._text.name
        top = tuple((int(index), name(int(index)), float(value)) for value, index in zip(*best, strict=True))
        return (TokenLogprob(token, name(token), float(values[token]), top),)

    def _add(self, piece: Piece, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None) -> None:
        now = time.perf_counter()
        begun = self._begun_at or now
        first = self._first_at or now
        timings = Timings(
            prompt_tokens=self.prompt_length,
            shared_tokens=self.shared_tokens,
            generated_tokens=self.generated,
            wait_seconds=begun - self._submitted,
            prompt_seconds=first - begun,
            generate_seconds=now - first,
            time_to_first_token=first - self._submitted,
            bytes_loaded=round(self._bytes_loaded),
            hits=round(self._hits),
            misses=round(self._misses),
            cycles=self.cycles,
            drafted=self._drafted,
            accepted=self._accepted,
        )
        stop = self._text.stop_text(tokens[-1]) if self._reason == "stop" and tokens else ""
        calls = self._text.calls
        content, reasoning, reasons = piece
        self.chunks.append(Chunk(content, tokens, self._reason, logprobs, timings, reasoning, calls, stop, reasons))
