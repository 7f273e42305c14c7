"""Chat templates within the limits say what transformers makes of them; others are refused, at once."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.guest.parsers.templates import GROWING, MESSAGES, USUAL
from edgemoe import CheckpointError
from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.checkpoint.foreign.template_budget import TemplateBudget, TemplateLimit
from edgemoe.checkpoint.foreign.template_limits import LimitedTemplates
from edgemoe.demo import demo_folder

MORE = (
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{{ m.content|upper }}"
    "{% else %}none{% endfor %}",
    "{% set x = ['a', messages[0].role, 3] %}{{ x }}{{ x|join('-') }}{{ x[::-1] }}{{ x + [4] }}{{ x|length }}",
    "{{ {'a': messages[0].content, 'b': [1, (2, 3)]}|tojson(indent=2) }}{{ dict(a=1)|items|list }}",
    "{% if 'user' in messages|map(attribute='role')|list and messages[0].content is string %}yes{% endif %}",
    "{{ '%s is %d' % ('a', 5) }}{{ '{} {x:>5}'.format(1, x=2) }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ -3 % 5 }}{{ 'ab' * 3 }}",
    "{% macro f(a, b='x') %}{{ a ~ b }}{% if caller %}{{ caller() }}{% endif %}{% endmacro %}{{ f(1) }}"
    "{% call f(2, b='y') %}z{% endcall %}",
    "{% set t %}{{ messages[1].content }}{% endset %}{{ t.split(' ')[0] }}{{ t|replace('a', 'b') }}{{ nothing }}",
    "{% filter upper %}{{ bos_token }}a{% endfilter %}{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}{{ messages|selectattr('role', "
    "'equalto', 'user')|map(attribute='content')|join(',') }}",
    "{{ ''.join(['a', 'b']) }}{{ 'a,b'.split(',')|first }}"
    "{{ messages|sort(attribute='role')|map(attribute='role')|list }}",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_folder())
    return loaded


@pytest.mark.parametrize("source", ["", USUAL, *GROWING, *MORE])
@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": True, "tools": [{"name": "f", "x": [1]}]}])
def test_the_text_is_transformers(tokenizer: Any, source: str, more: dict[str, Any]) -> None:
    how = {"tokenize": False, **more} | ({"chat_template": source} if source else {})
    assert LimitedTemplates(tokenizer)(MESSAGES, **how) == tokenizer.apply_chat_template(MESSAGES, **how)


def test_transformers_is_left_as_it_was(tokenizer: Any) -> None:
    endless = "{{ 'x' * 3000000 }}{{ 'y' * 3000000 }}"
    with pytest.raises(TemplateLimit):
        LimitedTemplates(tokenizer)(MESSAGES, chat_template=endless, tokenize=False)
    assert len(tokenizer.apply_chat_template(MESSAGES, chat_template=endless, tokenize=False)) == 6_000_000


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ '%2000000000s' % 'x' }}", "formats a field"),
        ("{{ '%.*f'|format(1000000000, 1.0) }}", "formats a field"),
        ("{{ '{:>1000000000}'.format('x') }}", "formats a field"),
        ("{{ '{:{}}'.format('x', 1000000000) }}", "formats a field"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}", "steps"),
        ("{{ 'a b ' * 3000000 }}", "a value of more"),
        ("{{ ['a'] * 3000000 }}", "a value of more"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "a value"),
        ("{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}", "a value"),
        (
            "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}",
            "a",
        ),
        ("{% set n = namespace() %}{% set n.a = [n] %}{{ n }}", "a value"),
        ("{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}", "an integer"),
        ("{{ 9 ** 99999999 }}", "an integer"),
        ("{{ 'x'|center(1000000000) }}", "a number above"),
        ("{{ 'x'.center(1000000000) }}", "a value"),
        ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "a value"),
        ("{{ ('a' * 99999)|replace('a', 'b' * 99999) }}", "a value"),
        ("{{ ('a\n' * 99999)|indent(90000) }}", "a value"),
        ("{{ (5).to_bytes(2000000000, 'big') }}", "a value"),
        ("{{ [1]|tojson(indent=1000000000) }}", "indents JSON"),
        ("{{ range(99999)|map('center', 99999)|join }}", "writes more|a value"),
        (
            "{% set a = 'a' * 4000000 %}{% for i in range(9999) %}{% if 'b' in a %}{% endif %}{% endfor %}",
            "writes",
        ),
        ("{% set a = 'a' * 4000000 %}{% for i in range(99) %}{{ a }}{% endfor %}", "writes more|a value"),
        ("{{ 1.5|round(1000000000, 'ceil') }}", "a number above"),
        ("x" * 200_000, "characters, and 131072 are read"),
    ],
)
def test_what_takes_too_much_is_refused_at_once(tokenizer: Any, source: str, why: str) -> None:
    begun = time.monotonic()
    with pytest.raises(TemplateLimit, match=why):
        LimitedTemplates(tokenizer)(MESSAGES, chat_template=source, tokenize=False)
    assert time.monotonic() - begun < 15


def test_a_long_conversation_has_more_to_spend(tokenizer: Any) -> None:
    messages = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant") * 400]
    how: dict[str, Any] = {"tokenize": False, "chat_template": USUAL}
    assert LimitedTemplates(tokenizer)(messages, **how) == tokenizer.apply_chat_template(messages, **how)
    assert TemplateBudget({"messages": messages}).max_value > 8_000_000


def test_threads_have_budgets_of_their_own(tokenizer: Any) -> None:
    templates, found = LimitedTemplates(tokenizer), list[str]()
    right = tokenizer.apply_chat_template(MESSAGES, tokenize=False)

    def render() -> None:
        found.extend(templates(MESSAGES, tokenize=False) for _ in range(20))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [right] * 80


def test_a_chats_tokens_are_transformers(tokenizer: Any) -> None:
    prompt = ChatPrompt(MESSAGES)
    right = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ChatTemplate(tokenizer, "it", 2048).render(prompt) == list(right)


def test_a_template_that_takes_too_much_is_refused_when_it_is_loaded(tokenizer: Any) -> None:
    class Endless:
        """The tokenizer with another template."""

        chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        apply_chat_template = type(tokenizer).apply_chat_template

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def get_chat_template(self, template: str | None, tools: Any) -> str:
            return template or self.chat_template

    with pytest.raises(CheckpointError, match=r"the chat template of it cannot be used, since it takes more than"):
        ChatTemplate(Endless(), "it")
