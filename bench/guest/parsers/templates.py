"""Chat templates: mutated ones of the usual kind, and those made of what can grow."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from bench.guest.parser import Parser
from edgemoe.checkpoint.foreign.template_limits import LimitedTemplates
from edgemoe.demo import demo_folder

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is 48 + 31?"},
    {"role": "assistant", "content": "79"},
    {"role": "user", "content": "and 5?"},
]
USUAL = """{%- set ns = namespace(last=-1, text='') -%}
{%- for m in messages[::-1] %}{% if m.role == 'user' and ns.last < 0 %}{% set ns.last = loop.index0 %}{% endif %}
{% endfor %}
{% macro shown(m, deep=3) %}{% if deep > 0 %}{{ shown(m, deep - 1) }}{% endif %}{{ m['content']|trim }}{% endmacro %}
{% for m in messages %}{% if loop.first and m.role == 'system' %}<s>{{ m.content.strip() }}</s>{% continue %}{% endif %}
{{- '<|' ~ m.role ~ '|>' + m.content.split('</think>')[-1].lstrip('\n') }}{{ shown(m) }}
{% set ns.text = ns.text ~ m.content %}{% endfor %}{{ messages|tojson }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
GROWING = (
    "{{ '%20s' % 'x' }}{{ '{:>20}'.format('x') }}{{ 'a b ' * 30 }}{{ 2 ** 30 }}{{ 'x'|center(80) }}",
    "{% for i in range(99) %}{% for j in range(99) %}{{ i }}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='ab', y=[1]) %}{% for i in range(9) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x|length }}{{ ns.y }}",
    "{{ ('ab' * 99)|replace('a', 'b' * 99)|indent(9) }}{{ range(99)|map('center', 99)|join('-' * 9) }}",
    "{{ (['x'] * 99)|join(', ') }}{{ 1.5|round(3) }}{{ [1, {'a': 2}]|tojson(indent=4) }}{{ '9' * 30|int }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}",
    "{{ 'ab'.ljust(30) + 'c'.zfill(30) + 'd\t'.expandtabs(30) }}{{ ' '.join(['x'] * 30) }}{{ (5).to_bytes(9, 'big') }}",
)


@cache
def _demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_folder())


def _samples(folder: Path) -> list[bytes]:
    return [text.encode() for text in (USUAL, *GROWING)]


def _parse(data: bytes, folder: Path) -> Any:
    return LimitedTemplates(_demo_tokenizer())(MESSAGES, chat_template=data.decode("utf-8", "replace"), tokenize=False)


# What a template does with its own values fails as in Python.
FAULTS = (
    TemplateError, NameError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
    SyntaxError,
)  # fmt: skip
PARSERS = (Parser("chat template", _samples, _parse, FAULTS, share=0.05, text=False),)
