"""The options every command shares, and the environment variable that stands in for each.

An option that is not given stays None, so that its default has one home: the library.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from edgemoe.cli.exits import UsageError
from edgemoe.cli.options.parser import Parser as Parser
from edgemoe.cli.options.parser import yes_or_no
from edgemoe.cli.options.values import (
    batch_size,
    budget,
    cpu_share,
    device,
    expert_cache,
    json_object,
    speed,
    thread_count,
)
from edgemoe.cli.options.values import counted as counted
from edgemoe.cli.options.values import decimal as decimal
from edgemoe.cli.options.values import one_of as one_of
from edgemoe.cli.options.values import port as port
from edgemoe.cli.options.values import text as text
from edgemoe.cli.options.values import whole as whole
from edgemoe.cli.options.values import words as words
from edgemoe.config import EngineConfig, choices_of, settings_of
from edgemoe.errors import RequestError
from edgemoe.sampling import Sampling

_FLAGS = {"context": ("-c", "--ctx-size"), "threads": ("-t", "--threads"), "model_config": ("--config",)}
"""Options with another name than their setting, or a short one."""


def flags_of(setting: str) -> tuple[str, ...]:
    """The options of a setting of the engine, the long one last."""
    return _FLAGS.get(setting, (f"--{setting.replace('_', '-')}",))


def option_of(setting: str) -> str:
    """The name under which the arguments have a setting of the engine."""
    return flags_of(setting)[-1].lstrip("-").replace("-", "_")


def _kind(setting: str) -> Callable[[str], Any]:
    """How a setting's value is read: by its choices, a reader of its own, or its type."""
    choices = choices_of(setting)
    if choices:
        return one_of(*choices)
    own: dict[str, Callable[[str], Any]] = {
        "batch": batch_size, "device": device, "expert_cache": expert_cache, "link_gbps": speed,
        "cpu_share": cpu_share, "budget": budget, "threads": thread_count,
    }  # fmt: skip
    by_type: dict[str, Callable[[str], Any]] = {"bool": yes_or_no, "int": counted, "int | None": counted}
    types = {entry.name: str(entry.type) for entry in fields(EngineConfig)}
    return own.get(setting) or by_type.get(types[setting]) or text


_KINDS = {setting: _kind(setting) for setting in settings_of()}


# --- groups of options ---------------------------------------------------------------------------

_SECTIONS = {
    "model": ("model_config", "offline", "state_folder"),
    "drafts": tuple(settings_of("draft")),
    "lossy": ("experts", "dense", "budget", "budget_rule", "budget_dropped"),
}
"""The section of the help for settings of an engine; all others are about memory and speed."""
_COMMON = ("context", "threads", "device", "expert_cache", "offline", "batch", "speculate")
"""Settings that the short help has."""
_DEFAULTS = {
    "context": f"the model's limit, {EngineConfig.default_context} at most",
    "threads": "the cores that this process may use",
    "model_config": "the file's own",
    "link_gbps": "the real link",
    "state_folder": "the user's cache folder",
}
"""What holds where a setting's default is None."""


def add_settings(parser: Parser, *groups: str) -> None:
    """The settings of an engine in `groups`, as `EngineConfig` defines them."""
    for name in settings_of(*groups):
        add_setting(parser, name)


def add_setting(parser: Parser, name: str) -> None:
    """One setting of an engine."""
    info = settings_of()[name]
    sections = [title for title, names in _SECTIONS.items() if name in names]
    # What is lossy is told of as that, whatever it belongs to.
    section = sections[-1] if sections else "memory and speed"
    rare = name not in _COMMON
    help = info.help.replace("%", "%%")
    if _KINDS[name] is yes_or_no:
        parser.switch(*flags_of(name), help=help, section=section, rare=rare)
        return
    default = _DEFAULTS.get(name) or getattr(EngineConfig, name, None)
    help += f" (default: {default})" if default is not None else ""
    parser.option(*flags_of(name), convert=_KINDS[name], metavar=info.metavar, help=help, section=section, rare=rare)


def add_model_options(parser: Parser) -> None:
    """Which model and how to hold it."""
    add_model_option(parser)
    add_settings(parser, "context", "machine", "draft")


def add_model_option(parser: Parser) -> None:
    """Which model, alone."""
    parser.option(
        "-m",
        "--model",
        convert=text,
        metavar="MODEL",
        help="folder, GGUF file or hub name of a checkpoint, such as org/name or org/name:Q4_K_M for GGUF files "
        "(default: the small demo model that ships with edgemoe)",
        section="model",
    )


def add_offline_option(parser: Parser) -> None:
    """Where a model may come from."""
    parser.switch("--offline", help=settings_of()["offline"].help, section="model")


_SAMPLING: tuple[tuple[tuple[str, ...], Callable[[str], Any], str, str], ...] = (
    (("-n", "--max-tokens"), whole, "N", f"most tokens of a reply ({EngineConfig.default_max_tokens})"),
    (("--temp",), decimal, "T", "temperature; 0 always takes the likeliest token (0)"),
    (("--top-k",), whole, "K", "choose among the K likeliest tokens (50; 0 is all)"),
    (("--top-p",), decimal, "P", "choose among the likeliest tokens that sum up to P (1)"),
    (("--min-p",), decimal, "P", "leave out tokens below P times the likeliest one (0)"),
    (("--repeat-penalty",), decimal, "X", "make tokens already there less likely (1)"),
    (("--presence-penalty",), decimal, "X", "lower what the reply has already (0)"),
    (("--frequency-penalty",), decimal, "X", "the same for each time it has it (0)"),
    (("--seed",), whole, "N", "start of the random numbers, for the same text again (random)"),
)
"""Names, kind, metavar and help of each option with a number, with what holds where the checkpoint says nothing."""
_RARE_SAMPLING = ("--top-k", "--min-p", "--repeat-penalty", "--presence-penalty", "--frequency-penalty")


def add_sampling_options(parser: Parser) -> None:
    """How to choose tokens. Without an option, the checkpoint's own setting holds."""
    for names, kind, metavar, told in _SAMPLING:
        help = told.replace("(", "(default: ")
        rare = names[-1] in _RARE_SAMPLING
        parser.option(*names, convert=kind, metavar=metavar, help=help, section="sampling", rare=rare)
    parser.option(
        "--stop",
        convert=words,
        metavar="TEXT",
        help="end the reply before TEXT; repeatable",
        repeated=True,
        section="sampling",
    )
    parser.switch(
        "--ignore-eos",
        help="go on after the model's end of text, up to --max-tokens",
        section="sampling",
        rare=True,
    )


def add_generation_options(parser: Parser) -> None:
    """Everything that generating takes: the model, the sampling, the system prompt, and what is said of it."""
    parser.option(
        "-sys",
        "--system-prompt",
        convert=words,
        metavar="TEXT",
        help="system prompt of conversations",
        section="request",
    )
    parser.option(
        "--chat-template-kwargs",
        convert=json_object,
        metavar="JSON",
        help='variables of the chat template, such as {"enable_thinking": false}',
        section="request",
        rare=True,
    )
    add_model_options(parser)
    add_settings(parser, "state")
    add_sampling_options(parser)
    parser.switch("-v", "--verbose", help="say more on standard error: the plan, the timings of each reply")


# --- from arguments to the library ---------------------------------------------------------------

_SAMPLING_FIELDS = {
    "max_tokens": "max_tokens",
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
    "ignore_eos": "ignore_eos",
    "logprobs": "logprobs",
}


def sampling_from(arguments: argparse.Namespace) -> Sampling:
    """The command line's sampling. Raises UsageError for a value outside its limits."""
    for option, field in _SAMPLING_FIELDS.items():
        try:
            Sampling(**_given(arguments, {option: field}))
        except RequestError as error:
            raise UsageError(f"argument --{option.replace('_', '-')}: {error}") from error
    return Sampling(**_given(arguments, _SAMPLING_FIELDS))


def model_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Engine.load` and `Engine.plan_for` that the command line gives."""
    return _given(arguments, {"model": "model"} | {option_of(name): name for name in settings_of()})


def _given(arguments: argparse.Namespace, fields: Mapping[str, str]) -> dict[str, Any]:
    values = {field: getattr(arguments, option, None) for option, field in fields.items()}
    return {field: value for field, value in values.items() if value is not None}


def read_command_line(
    parser: Parser, argv: Sequence[str] | None, environment: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Parse, then fill in from the environment. The chosen command's parser is its `parser` default."""
    return parser.read(argv, environment)
