"""One request from prompt to reply: sampling, text, stopping and measuring. A batch drives it with logits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.request.detokenizer import Detokenizer, NoText, StopTexts
from edgemoe.request.sampler import Sampler
from edgemoe.request.token_key import token_key
from edgemoe.results import Chunk, Timings, TokenLogprob
from edgemoe.sampling import ResolvedSampling


class Cancels:
    """Counts what was asked to end, so that a call ends what is there when it comes and nothing later. Thread-safe."""

    def __init__(self) -> None:
        self.all = 0
        self.waiting = 0


class Request:
    """A request on its way. `chunks` fills with the reply, one a token; the last has the finish reason.

    `cache` is None while it waits. `tokens` are prompt and reply; those beyond the past are still to be computed.
    """

    def __init__(
        self, number: int, prompt: Sequence[int], settings: ResolvedSampling, tokenizer: Any, cancels: Cancels
    ) -> None:
        self.number = number
        self.tokens = list(prompt)
        self.key = token_key(prompt)
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + settings.max_tokens
        self.cache: SequenceCache | None = None
        self.chunks: deque[Chunk] = deque()
        self.error: BaseException | None = None
        self.shared_tokens = 0
        self.lossy = False
        """Whether its KV cache has tokens that were computed under a budget on experts."""
        self.abandoned = False
        """Whether nobody waits for it any more."""
        self._settings = settings
        self._tokenizer = tokenizer
        self._cancels = cancels
        self._cancelled_before = cancels.all, cancels.waiting
        self._sampler = Sampler(settings)
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else NoText()
        self._stops = StopTexts(settings.stop)
        self._reason: str | None = None
        self._submitted = time.perf_counter()
        self._begun_at = 0.0
        self._first_at = 0.0
        self._hits = self._misses = self._bytes_loaded = 0.0
        self.cycles = 0
        """Verifications of what was drafted for it."""
        self._drafted = self._accepted = 0

    @property
    def missing(self) -> int:
        """Tokens that its past does not have yet."""
        return len(self.tokens) - (self.cache.tokens if self.cache is not None else 0)

    @property
    def finished(self) -> bool:
        """Whether its last chunk is there, or its error."""
        return self._reason is not None or self.error is not None

    @property
    def begun(self) -> bool:
        """Whether it has had a place in the batch."""
        return bool(self._begun_at)

    @property
    def generated(self) -> int:
        """Tokens of the reply so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end the reply."""
        return self._settings.eos

    @property
    def cancelled(self) -> bool:
        """Whether it is to end: nobody waits for it, or a cancel has come since it was made that means it."""
        everything, waiting = self._cancelled_before
        if self.abandoned or self._cancels.all > everything:
            return True
        return not self.begun and self._cancels.waiting > waiting

    def begin(self, cache: SequenceCache) -> None:
        """Starts it, or starts it again, with a KV cache of its own that may hold a part of its tokens."""
        self.cache = cache
        if not self.begun:
            self._begun_at = time.perf_counter()
            self.shared_tokens = cache.tokens

    def release_cache(self) -> SequenceCache:
        """Gives its KV cache to the caller; what it has generated stays."""
        cache, self.cache = self.cache, None
        assert cache is not None
        return cache

    def account(self, hits: float, misses: float, nbytes: float) -> None:
        """Adds its share of what a step asked for and moved."""
        self._hits += hits
        self._misses += misses
        self._bytes_loaded += nbytes

    def advance(self, logits: torch.Tensor) -> None:
        """Draws the next token from `logits`, float32 [vocabulary] on the CPU, and adds its chunk."""
        self._append(self._draw(logits), logits)

    def verify(self, tree: DraftTree, logits: torch.Tensor) -> list[int]:
        """Adds the tokens that `logits`, [nodes, vocabulary], give along `tree`, whose root is the last token.

        They are drawn as `advance` draws them, so that the reply is what it would be without a tree. Returns the
        nodes whose tokens are in the reply, root first: what its past is to keep.
        """
        path = [0]
        self.cycles += 1
        self._drafted += tree.drafted
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

    def candidates(self, tree: DraftTree, node: int, logits: torch.Tensor, most: int) -> list[tuple[int, float]]:
        """The `most` likeliest draws after `node`, were `logits` the model's: tokens, and how far each stands out.

        The latter as shares of a softmax, noise included where the request is sampled.
        """
        scores = self._sampler.scores(self.tokens + tree.text(node), logits, ahead=tree.depths[node])
        best = scores.softmax(-1).topk(min(most, len(scores)))
        return [(int(token), float(share)) for share, token in zip(*best, strict=True) if share > 0]

    def cancel(self) -> None:
        """Ends it with what there is."""
        self._reason = "cancelled"
        self._add(self._rest(), (), None)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, which its consumer gets."""
        self.error = error

    def _draw(self, logits: torch.Tensor) -> int:
        return self._sampler.draw(self.tokens, logits)

    def _append(self, token: int, logits: torch.Tensor) -> None:
        self._first_at = self._first_at or time.perf_counter()
        self.tokens.append(token)
        self._reason, text = self._follow(token)
        self._add(text, (token,), self._logprobs(token, logits))

    def _follow(self, token: int) -> tuple[str | None, str]:
        """Why the reply ends after `token`, if it does, and the text that may be given out."""
        if token in self._settings.eos:
            return "stop", self._rest()
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.found:
            return "stop", text
        if len(self.tokens) >= self.max_length:
            text += self._rest()
            return ("stop" if self._stops.found else "length"), text
        return None, text

    def _rest(self) -> str:
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()

    def _logprobs(self, token: int, logits: torch.Tensor) -> tuple[TokenLogprob, ...] | None:
        count = self._settings.logprobs
        if count is None:
            return None
        values = logits.log_softmax(-1)
        best = values.topk(count)
        top = tuple((int(index), self._name(int(index)), float(value)) for value, index in zip(*best, strict=True))
        return (TokenLogprob(token, self._name(token), float(values[token]), top),)

    def _name(self, token: int) -> str:
        return str(self._tokenizer.decode([token])) if self._tokenizer is not None else str(token)

    def _add(self, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None) -> None:
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
        self.chunks.append(Chunk(text, tokens, self._reason, logprobs, timings))
