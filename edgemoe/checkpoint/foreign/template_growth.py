"""How long the results of jinja's operators, methods and filters can become, before they are computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgemoe.checkpoint.foreign.template_budget import MAX_BITS, TemplateBudget, TemplateLimit

MAX_WIDTH = 100_000
"""Of a field, a margin or a list that is filled up."""
MAX_MARKUP = 100_000
"""Characters that the filters for web pages take: some of them take the square of their time."""
MARKUP = ("urlize", "striptags", "xmlattr", "wordwrap", "pprint")
MAX_JSON_INDENT = 100
PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")
"""A field of a %-format, with its width and its precision."""
BRACES = re.compile(r"\{[^{}]*(\{|\d{6,})")
"""A field of a format whose width is a field itself, or a number of many digits."""


def check_operator(budget: TemplateBudget, operator: str, left: Any, right: Any) -> None:
    """Raises TemplateLimit if the result would be too large."""
    if operator == "*":
        for value, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(value, (str, bytes, list, tuple)):
                budget.expect(max(count, 0) * max(budget.size(value), 1))
        if isinstance(left, int) and isinstance(right, int):
            _expect_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _expect_bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, (str, bytes)):
        check_percent(budget, left, right)


def check_percent(budget: TemplateBudget, text: str | bytes, values: Any) -> None:
    """Raises TemplateLimit if a %-format could become too long."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    fields = list(PERCENT.finditer(text))
    for field in fields:
        for number in field.groups():
            if number == "*" or (number and (len(number) > 6 or int(number) > MAX_WIDTH)):
                raise TemplateLimit(f"it formats a field {field[0][:20]!r} wider than {MAX_WIDTH} characters")
    widest = sum(int(number) for field in fields for number in field.groups() if number)
    budget.expect(len(text) + widest + len(fields) * budget.size(values))


def _braces(budget: TemplateBudget, text: str, values: Sequence[Any]) -> None:
    found = BRACES.search(text)
    if found:
        raise TemplateLimit(f"it formats a field {found[0][:20]!r} wider than {MAX_WIDTH} characters")
    budget.expect(len(text) + text.count("{") * (MAX_WIDTH // 100 + sum(budget.size(value) for value in values)))


def _expect_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimit(f"it makes an integer of more than {MAX_BITS} bits")


def check_method(budget: TemplateBudget, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises TemplateLimit if calling `method`, a method of a text, bytes or an integer, would give too much."""
    method = getattr(method, "__wrapped__", method)
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(owner, int) and name == "to_bytes":
        budget.expect(max([value for value in (*args, *kwargs.values()) if isinstance(value, int)], default=0))
    if not isinstance(owner, (str, bytes)):
        return
    budget.look(owner)
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.expect(max(numbers, default=0))
    elif name == "expandtabs":
        budget.expect(len(owner) * max([*numbers, 8]))
    elif name == "translate" and args and isinstance(args[0], dict):
        budget.expect(len(owner) * max([budget.size(value) for value in args[0].values()], default=1))
    elif name in ("format", "format_map") and isinstance(owner, str):
        _braces(budget, owner, (*args, *kwargs.values()))
    elif name == "replace" and len(args) > 1:
        expect_replaced(budget, owner, args[0], args[1])
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        budget.expect(budget.size(args[0]) + len(owner) * len(args[0]))


def expect_replaced(budget: TemplateBudget, text: Any, old: Any, new: Any) -> None:
    """Raises TemplateLimit if `text` with `new` for `old` would be too long."""
    if isinstance(old, type(text)) and isinstance(new, type(text)) and isinstance(text, (str, bytes)):
        budget.expect(len(text) + text.count(old) * len(new))


def check_filter(budget: TemplateBudget, name: str, value: Any, args: Sequence[Any]) -> None:
    """Raises TemplateLimit if the filter `name` of `value` would give too much; `args` are all of its arguments."""
    if isinstance(value, (str, bytes)):
        budget.look(value)
    numbers = [each for each in args if isinstance(each, int)]
    check = FILTERS.get(name)
    if check is not None:
        check(budget, value, args)
    if name in MARKUP and budget.size(value) > MAX_MARKUP:
        raise TemplateLimit(f"it gives {name} more than {MAX_MARKUP} characters")
    if name in WIDTHS and any(abs(number) > MAX_WIDTH for number in numbers):
        raise TemplateLimit(f"it gives {name} a number above {MAX_WIDTH}")


def _indent(budget: TemplateBudget, value: Any, args: Sequence[Any]) -> None:
    width = max(
        [len(each) if isinstance(each, str) else each for each in args if isinstance(each, (str, int))], default=4
    )
    budget.expect((str(value).count("\n") + 1) * width)


def _tojson(budget: TemplateBudget, value: Any, args: Sequence[Any]) -> None:
    for each in args:
        width = len(each) if isinstance(each, str) else each
        if isinstance(width, int) and width > MAX_JSON_INDENT:
            raise TemplateLimit(f"it indents JSON by more than {MAX_JSON_INDENT} characters")
    budget.expect(budget.size(value))


def _replace(budget: TemplateBudget, value: Any, args: Sequence[Any]) -> None:
    if len(args) > 1:
        expect_replaced(budget, str(value), args[0], args[1])


def _join(budget: TemplateBudget, value: Any, args: Sequence[Any]) -> None:
    if isinstance(value, (list, tuple)):
        between = max([len(each) for each in args if isinstance(each, str)], default=0)
        budget.expect(budget.size(value) + between * len(value))


def _format(budget: TemplateBudget, value: Any, args: Sequence[Any]) -> None:
    check_percent(budget, str(value), list(args))


def _sum(budget: TemplateBudget, value: Any, args: Sequence[Any]) -> None:
    if any(isinstance(each, (list, tuple)) for each in args):
        raise TemplateLimit("it adds up lists")


FILTERS: dict[str, Callable[[TemplateBudget, Any, Sequence[Any]], None]] = {
    "indent": _indent,
    "tojson": _tojson,
    "replace": _replace,
    "join": _join,
    "format": _format,
    "sum": _sum,
}
"""Filters whose results can be longer than what they are given."""
WIDTHS = ("center", "indent", "truncate", "wordwrap", "round", "batch", "slice")
"""Filters with a number that decides about the length of the result."""
