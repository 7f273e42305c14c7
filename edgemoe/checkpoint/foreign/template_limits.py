"""Chat templates run with limits on steps, time and memory, in transformers' own environment otherwise.

A template is a program that comes with a checkpoint. jinja's sandbox keeps it from the files and from Python, and lets
it take all time and memory. Here every loop, operator, call and filter counts against a budget: the generated code has
a call in each loop, and what could become large is looked at before it is made. The result of a template that stays
within the limits is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import FunctionType, GeneratorType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.environment import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgemoe.checkpoint.foreign.template_budget import TemplateBudget, TemplateLimit
from edgemoe.checkpoint.foreign.template_growth import check_filter, check_method, check_operator

MAX_SOURCE = 128 << 10
"""Characters of a template: published ones have some ten thousand at most."""
LEFT_OUT = ("lipsum",)
"""Functions of jinja that no chat template needs, and that take as long as their argument says."""
STEP, WEIGH, LOOK, CONCAT = "edgemoe step", "edgemoe weigh", "edgemoe look", "edgemoe concat"
"""Names of filters that no template can name."""
_BUDGET: ContextVar[TemplateBudget] = ContextVar("budget")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which a rendering takes from the budget of its thread."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, base: Any) -> None:
        """With the extensions, filters, tests and globals of `base`, the environment that transformers makes."""
        extensions = [type(each) for each in base.extensions.values()]
        super().__init__(
            trim_blocks=base.trim_blocks,
            lstrip_blocks=base.lstrip_blocks,
            extensions=extensions,
            finalize=_finalized,
        )
        self.filters = {name: _limited_filter(name, each) for name, each in base.filters.items()}
        self.filters |= {STEP: _step, WEIGH: _weigh, LOOK: _look, CONCAT: _concat}
        self.tests = {name: _limited_test(each) for name, each in base.tests.items()}
        self.globals = {name: each for name, each in base.globals.items() if name not in LEFT_OUT}

    concat = staticmethod(lambda parts: _budget().join(parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See the base class."""
        budget = _budget()
        budget.step()
        check_operator(budget, operator, left, right)
        return budget.weigh(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """See the base class."""
        budget = _budget()
        budget.step()
        args = tuple(list(each) if isinstance(each, GeneratorType) else each for each in args)
        check_method(budget, function, args, kwargs)
        return budget.weigh(super().call(context, function, *args, **kwargs))

    def compiled(self, source: str) -> Template:
        """The template, whose loops and macros count their steps. Raises TemplateLimit for one that is too long."""
        if len(source) > MAX_SOURCE:
            raise TemplateLimit(f"it has {len(source)} characters, and {MAX_SOURCE} are read")
        tree = self.parse(source)
        _instrument(tree, self)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))


class LimitedTemplate:
    """A compiled template whose `render` has a budget of its own."""

    def __init__(self, environment: LimitedEnvironment, source: str) -> None:
        self.environment = environment
        self._template = self._within({}, lambda: environment.compiled(source))

    def render(self, **variables: Any) -> str:
        """The text. Raises TemplateLimit, with what is exceeded, and what the template itself raises."""
        text: str = self._within(variables, lambda: self._template.render(**variables))
        return text

    def _within(self, variables: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        token = _BUDGET.set(TemplateBudget(variables))
        try:
            return run()
        finally:
            _BUDGET.reset(token)


class LimitedTemplates:
    """A tokenizer's `apply_chat_template`, with limits on what the templates take. Thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, LimitedTemplate] = {}
        self._apply = self._with_limits()

    def __call__(self, messages: Any, **how: Any) -> Any:
        """What transformers' method gives. Raises TemplateLimit, and what that method raises."""
        return self._apply(messages, **how)

    def _with_limits(self) -> Callable[..., Any]:
        """transformers' two functions, which prepare the variables, with our compiled templates in place of theirs.

        They are copied with other globals, since a replaced global would change transformers for the whole process.
        A tokenizer class that renders no jinja, such as Mistral's own, is left as it is.
        """
        apply = type(self._tokenizer).apply_chat_template
        render = getattr(apply, "__globals__", {}).get("render_jinja_template")
        makes = getattr(render, "__globals__", {}).get("_compile_jinja_template")
        if not isinstance(apply, FunctionType) or not isinstance(render, FunctionType) or makes is None:
            made: Callable[..., Any] = self._tokenizer.apply_chat_template
            return made
        self._base = makes("").environment
        render = _with_globals(render, _compile_jinja_template=self._compiled)
        return functools.partial(_with_globals(apply, render_jinja_template=render), self._tokenizer)

    def _compiled(self, source: str) -> LimitedTemplate:
        if source not in self._templates:
            self._templates[source] = LimitedTemplate(LimitedEnvironment(self._base), source)
        return self._templates[source]


def _with_globals(function: FunctionType, **replaced: Any) -> FunctionType:
    made = FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _budget() -> TemplateBudget:
    return _BUDGET.get()


def _finalized(value: Any) -> Any:
    return value if isinstance(value, str) else _budget().weigh(value)


@pass_context
def _step(context: Context, count: int) -> None:
    """Counts a round of a loop. It takes the context, since jinja would compute it once otherwise."""
    _budget().step(count)


def _weigh(value: Any) -> Any:
    return _budget().weigh(value)


def _look(value: Any) -> Any:
    return _budget().look(value)


def _concat(parts: Iterable[Any]) -> str:
    budget = _budget()
    return budget.join(str(budget.weigh(part)) for part in parts)


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        budget.step()
        if len(args) > place:
            value = args[place]
            value = list(_counted(value, budget)) if isinstance(value, GeneratorType) and name == "join" else value
            check_filter(budget, name, value, (*args[place + 1 :], *kwargs.values()))
            args = (*args[:place], value, *args[place + 1 :])
        return budget.weigh(function(*args, **kwargs))

    return limited


def _counted(values: Iterable[Any], budget: TemplateBudget) -> Iterator[Any]:
    for value in values:
        budget.step()
        budget.weigh(value)
        yield value


def _limited_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        budget.step()
        for each in args:
            budget.look(each)
        return function(*args, **kwargs)

    return limited


def _instrument(tree: nodes.Template, environment: LimitedEnvironment) -> None:
    """Has every loop and macro of the tree count its rounds, and what makes or compares values weigh them."""
    for loop in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        assert isinstance(loop, (nodes.For, nodes.Macro, nodes.CallBlock))
        count = nodes.Const(1 + sum(len(list(part.find_all(nodes.Node))) for part in loop.body))
        loop.body.insert(0, nodes.ExprStmt(_filter(count, STEP)))
    for node in list(tree.find_all(nodes.Node)):
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, field, _wrapped(value, node))
            elif isinstance(value, list):
                value[:] = [_wrapped(each, node) if isinstance(each, nodes.Node) else each for each in value]
    tree.set_environment(environment)


def _wrapped(node: nodes.Node, parent: nodes.Node) -> nodes.Node:
    """`node`, inside of the filter that weighs what it gives."""
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes), CONCAT)
    made = isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)) and getattr(node, "ctx", "load") == "load"
    if made and any(node.find_all((nodes.Name, nodes.Call))):
        return _filter(node, WEIGH)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice) and node.ctx == "load":
        return _filter(node, WEIGH)
    if isinstance(parent, (nodes.Compare, nodes.Operand)) and isinstance(node, nodes.Expr):
        return node if isinstance(node, nodes.Const) else _filter(node, LOOK)
    return node


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)
