"""What one rendering of a chat template may take: steps, characters of one value, and characters in all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_VALUE = 4 << 20
"""Characters of one value, written out. A context of a million tokens is about as long."""
MAX_WRITTEN = 64 << 20
"""Characters of all values of a rendering together: what it may hold in memory, and what it has to copy."""
MAX_STEPS = 1 << 19
"""Nodes of the template that are computed: about a second."""
VALUE_SHARE, WRITTEN_SHARE, STEPS_PER_VALUE = 16, 64, 4000
"""What a long conversation is given more: for each of its characters, and for each of its lists and objects.

A template may add to a text with each message, which writes all of the text each time.
"""
MAX_BITS = 100_000
"""Of an integer."""
ELEMENT = 32
"""Characters that an element of a list or an object counts as, for what it takes in memory."""
READING = 16
"""Characters that are searched or compared in the time of writing one."""


class TemplateLimit(SecurityError):
    """A template takes more than it may."""


class TemplateBudget:
    """What is left to one rendering. Not thread-safe: each rendering has its own."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        """`variables` are what the template is given; they are not counted as its work."""
        self._known: dict[int, int] = {}
        given = sum(self._learn(value) for value in variables.values())
        self.max_value = max(MAX_VALUE, VALUE_SHARE * given)
        self._written = max(MAX_WRITTEN, (WRITTEN_SHARE + len(self._known)) * given)
        self._steps = MAX_STEPS + STEPS_PER_VALUE * len(self._known)

    def step(self, count: int = 1) -> None:
        """Counts nodes that are computed. Raises TemplateLimit after too many."""
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimit(f"it takes more than {MAX_STEPS} steps")

    def spend(self, characters: int) -> None:
        """Counts characters that are written. Raises TemplateLimit after too many."""
        self._written -= characters
        if self._written < 0:
            raise TemplateLimit(f"it writes more than {MAX_WRITTEN} characters")

    def expect(self, characters: int) -> None:
        """Raises TemplateLimit if a value of `characters` characters would be too long."""
        if characters > self.max_value:
            raise TemplateLimit(f"it makes a value of more than {MAX_VALUE} characters")

    def weigh(self, value: Any) -> Any:
        """Returns `value`, after counting it as written."""
        self.spend(self.size(value))
        return value

    def look(self, value: Any) -> Any:
        """Returns `value`, after counting it as read."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value) // READING)
        elif isinstance(value, (list, tuple, dict)):
            self.spend(self.size(value))
        return value

    def join(self, parts: Iterable[str]) -> str:
        """The parts of a text as one."""
        found, length = [], 0
        for part in parts:
            found.append(part)
            length += len(part)
            self.expect(length)
        self.spend(length)
        return "".join(found)

    def size(self, value: Any) -> int:
        """Characters of `value` written out; of lists and objects with all that is in them."""
        if isinstance(value, (str, bytes)):
            self.expect(len(value))
            return len(value)
        total, stack = 0, [value]
        while stack:
            each = stack.pop()
            total += self._known.get(id(each)) or self._own_size(each, stack.extend)
            self.expect(total)
        return total

    def _own_size(self, value: Any, more: Callable[[Iterable[Any]], None]) -> int:
        """Characters of `value` without the elements, which `more` is given."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TemplateLimit(f"it makes an integer of more than {MAX_BITS} bits")
        if isinstance(value, Namespace):
            # Its own attribute access looks into what the template has stored.
            value = object.__getattribute__(value, "_Namespace__attrs")
        if isinstance(value, dict):
            self.expect(ELEMENT * len(value))
            more(value.keys())
            more(value.values())
            return ELEMENT * len(value) + 1
        if isinstance(value, (list, tuple, set, frozenset)):
            self.expect(ELEMENT * len(value))
            more(value)
            return ELEMENT * len(value) + 1
        return 1

    def _learn(self, value: Any) -> int:
        """The size of a value that the template is given, which is kept for each list and object in it."""
        if isinstance(value, dict):
            size = sum(self._learn(each) for pair in value.items() for each in pair) + ELEMENT * len(value) + 1
        elif isinstance(value, (list, tuple)):
            size = sum(self._learn(each) for each in value) + ELEMENT * len(value) + 1
        else:
            return len(value) if isinstance(value, (str, bytes)) else 1
        self._known[id(value)] = size
        return size
