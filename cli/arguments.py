"""The options every command shares, and the environment variable that stands in for each.

An option that is not given stays None, so that its default has one home: the library.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from edgemoe.cli.exits import UsageError
from edgemoe.cli.options.parser import Parser as Parser
from edgemoe.cli.options.parser import cut, yes_or_no
from edgemoe.cli.options.suggestions import did_you_mean
from edgemoe.config import EngineConfig, choices_of, settings_of
from edgemoe.errors import RequestError
from edgemoe.sampling import Sampling
from edgemoe.sizes import parse_bytes

_SHARE = re.compile(r"\d+(\.\d+)?%")
MAX_WHOLE = (1 << 63) - 1
"""Largest whole number that an option takes."""
_MAX_DIGITS = 400
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


# --- values --------------------------------------------------------------------------------------


def text(value: str) -> str:
    """Any text."""
    return value


def words(value: str) -> str:
    """A text for the model. A path may have any bytes, a text may not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8 text") from None
    return value


def whole(value: str) -> int:
    """A whole number of 64 bits; narrower limits are the library's."""
    # Python reads numbers of at most 4300 digits, and says so in words that are not for people.
    try:
        number = int(value) if len(value) <= _MAX_DIGITS else _digits(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is not a whole number") from None
    if abs(number) > MAX_WHOLE:
        raise argparse.ArgumentTypeError(f"{cut(value)} is too large; give {MAX_WHOLE} at most")
    return number


def _digits(value: str) -> int:
    """A number beyond every limit where `value` is one; ValueError else."""
    sign, digits = (-1, value[1:]) if value[:1] == "-" else (1, value)
    if not digits.strip().isdecimal():
        raise ValueError
    return sign * (MAX_WHOLE + 1)


def counted(value: str) -> int:
    """A whole number, 1 or more."""
    number = whole(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1; give 1 or more")
    return number


def decimal(value: str) -> float:
    """A finite number; narrower limits are the library's."""
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{cut(value)!r} must be a finite number")
    return number


def json_object(value: str) -> dict[str, Any]:
    """An object in JSON."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{cut(value)!r} is no JSON object such as {{"enable_thinking": false}}')
    return found


def speed(value: str) -> float:
    """A number above 0."""
    try:
        number = decimal(value)
    except argparse.ArgumentTypeError:
        number = 0.0
    if number <= 0:
        raise argparse.ArgumentTypeError(
            f"{cut(value)} is not above 0; give a speed in gigabytes a second, such as 12.5"
        )
    return number


def one_of(*names: str) -> Callable[[str], str]:
    """One of a few words."""

    def named(value: str) -> str:
        if value not in names:
            meant = did_you_mean(value, names)
            raise argparse.ArgumentTypeError(f"{cut(value)!r} is not known; give one of {', '.join(names)}{meant}")
        return value

    return named


def batch_size(value: str) -> str | int:
    """How many sequences to decode together: a number, or auto."""
    size = value.strip().lower()
    if size != "auto" and not size.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is no size of a batch; give auto, or a number such as 16")
    return size if size == "auto" else counted(size)


def device(value: str) -> str:
    """Where to compute."""
    if not _DEVICE.fullmatch(value):
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is not known; give one of auto, cpu, cuda, cuda:N")
    return value


def expert_cache(value: str) -> str | int:
    """The size of the expert cache as the library takes it: a number of slots as an int, all else as text."""
    size = value.strip()
    if size.isdecimal():
        return whole(size)
    if size.lower() == "auto" or _SHARE.fullmatch(size):
        return size
    try:
        parse_bytes(size)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{cut(value)!r} is not a size; give auto, bytes such as 6GiB, a share of the experts such as 40%, "
            "or a number of slots such as 96"
        ) from None
    return size


def cpu_share(value: str) -> str:
    """A share of the missing experts; the limits are the library's."""
    share = value.strip().lower()
    if share not in ("auto", "off"):
        try:
            float(share.removesuffix("%"))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{cut(value)!r} is not a share; give auto, off, or a share of the missing experts such as 35% or 0.35"
            ) from None
    return share


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
        "cpu_share": cpu_share,
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
