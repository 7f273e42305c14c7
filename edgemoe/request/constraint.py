"""A reply that must follow a grammar: which tokens may come next. The grammars are llguidance's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence, Set
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from edgemoe.errors import RequestError, told_as
from edgemoe.request.token_texts import TokenTexts
from edgemoe.response_format import llguidance, one_line, parser_limits

Ids = npt.NDArray[np.int64]
KEPT_GRAMMARS = 32
"""Grammars that are kept for the next request that has one of them."""


class _GrammarTokens(NamedTuple):
    """A tokenizer as llguidance sees it."""

    tokenizer: Any
    """llguidance's LLTokenizer."""
    hidden: Ids
    """Ids that it takes for text, or for the end, and that have no text in a reply."""


class Constraint:
    """The state of one reply in a grammar. It follows the tokens of the reply, and only these.

    Every method raises RequestError where llguidance gives up, such as for a grammar that is too ambiguous.
    """

    def __init__(self, matcher: Any, hidden: Ids) -> None:
        """`matcher` is llguidance's, and the constraint's own; the tokens `hidden` never have a place in it."""
        self._matcher = matcher
        self._hidden = hidden

    @property
    def complete(self) -> bool:
        """Whether the reply is all that the grammar asks for, and nothing may follow."""
        self._check()
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    def accept(self, token: int) -> None:
        """Appends `token` to the reply, one that is allowed and no end token."""
        self._matcher.consume_token(token)
        self._check()

    def allowed(self, vocabulary: int, ends: Set[int]) -> torch.Tensor:
        """Which of `vocabulary` tokens may come next, bool [vocabulary]: at least one.

        The tokens `ends` may, where the reply may end.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        # In NumPy: PyTorch's threads cost more than they save here.
        mask = np.zeros(vocabulary, np.bool_)
        count = min(vocabulary, len(bits))
        mask[:count] = bits[:count].view(np.bool_)
        mask[self._hidden[self._hidden < vocabulary]] = False
        mask[[token for token in ends if token < vocabulary]] = self._matcher.is_accepting()
        if not mask.any():
            raise RequestError("no token can follow in the form that the reply must have: change response_format")
        return torch.from_numpy(mask)

    def allowed_after(self, drafted: Sequence[int], vocabulary: int, ends: Set[int]) -> torch.Tensor | None:
        """As `allowed`, after the tokens `drafted` as well; None where these do not follow the grammar.

        The state of the reply stays as it is.
        """
        if not drafted:
            return self.allowed(vocabulary, ends)
        ahead = self._matcher.deep_copy()
        if ahead.try_consume_tokens(list(drafted)) < len(drafted) or ahead.is_error():
            return None
        return Constraint(ahead, self._hidden).allowed(vocabulary, ends)

    def _check(self) -> None:
        if self._matcher.is_error():
            why = one_line(self._matcher.get_error())
            raise RequestError(f"the form of the reply cannot be followed ({why}): change response_format")


class Constraints:
    """Makes the constraints on the replies of one tokenizer. llguidance is imported with the first."""

    def __init__(self, tokenizer: Any, texts: TokenTexts) -> None:
        """`tokenizer` is transformers'."""
        self._tokenizer = tokenizer
        self._texts = texts
        self._matchers: OrderedDict[str, Any] = OrderedDict()

    def new(self, grammar: str) -> Constraint:
        """A reply at its beginning, under `grammar` in llguidance's form of Lark.

        Raises RequestError where it is not supported, or nothing is in it, and without llguidance.
        """
        tokens = self._tokens
        made = self._matchers.pop(grammar, None)
        if made is None:
            made = llguidance().LLMatcher(tokens.tokenizer, grammar, log_level=0, limits=parser_limits())
            fault = one_line(made.get_error())
            if fault:
                raise RequestError(f"the form of the reply cannot be followed ({fault}): change response_format")
        self._matchers[grammar] = made
        while len(self._matchers) > KEPT_GRAMMARS:
            self._matchers.popitem(last=False)
        return Constraint(made.deep_copy(), tokens.hidden)

    @cached_property
    def _tokens(self) -> _GrammarTokens:
        llguidance()
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError("this tokenizer has no form that llguidance reads: leave response_format out")

        def unusable(why: str) -> RequestError:
            return RequestError(f"llguidance cannot read this tokenizer ({one_line(why)}): leave response_format out")

        with told_as(unusable):
            made = self._made()
        hidden = [token for token in self._texts.special if not made.is_special_token(token)]
        return _GrammarTokens(made, np.array(sorted({*hidden, *made.eos_tokens}), np.int64))

    def _made(self) -> Any:
        from llguidance.hf import from_tokenizer

        end = self._tokenizer.eos_token_id
        # It must have one; that it may come is decided by the request's own.
        return from_tokenizer(self._tokenizer, eos_token=min(self._texts.special, default=0) if end is None else end)
