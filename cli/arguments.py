"""The options every command shares, and the environment variable that stands in for each.

An option that is not given stays None, so that its default has one home: the library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

from edgemoe.cli.exits import UsageError
from edgemoe.config import EngineConfig, choices_of, settings_of
from edgemoe.errors import RequestError
from edgemoe.sampling import Sampling
from edgemoe.sizes import parse_bytes

_SHARE = re.compile(r"\d+(\.\d+)?%")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_WORDS_FOR = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class _Variable(NamedTuple):
    """An environment variable, the option it stands in for, and whether that option is a list."""

    name: str
    option: str
    convert: Callable[[str], Any]
    listed: bool


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and whose options can come from the environment."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)
        self._variables: list[_Variable] = []

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and leaving the process."""
        raise UsageError(f"{message}; see '{self.prog} --help'")

    def option(
        self, *names: str, convert: Callable[[str], Any], metavar: str, help: str, repeated: bool = False
    ) -> None:
        """Add an option with a value; the last name gives the environment variable its name."""
        variable = _variable_for(names)
        action = self.add_argument(
            *names,
            type=convert,
            metavar=metavar,
            action="append" if repeated else "store",
            help=f"{help} [{variable}]",
        )
        self._variables.append(_Variable(variable, action.dest, convert, repeated))

    def switch(self, *names: str, help: str) -> None:
        """Add an option without a value; its environment variable is 1 or 0."""
        variable = _variable_for(names)
        action = self.add_argument(*names, action="store_true", default=None, help=f"{help} [{variable}]")
        self._variables.append(_Variable(variable, action.dest, yes_or_no, False))

    def fill_from_environment(self, arguments: argparse.Namespace, environment: Mapping[str, str]) -> None:
        """Give each option that the command line left out the value of its variable, when that is set and not empty."""
        for variable in self._variables:
            text = environment.get(variable.name, "")
            if not text or getattr(arguments, variable.option) is not None:
                continue
            try:
                value = variable.convert(text)
            except argparse.ArgumentTypeError as error:
                self.error(f"environment variable {variable.name}: {error}")
            setattr(arguments, variable.option, [value] if variable.listed else value)


def _variable_for(names: Sequence[str]) -> str:
    return "EDGEMOE_" + names[-1].lstrip("-").replace("-", "_").upper()


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
    """A whole number; the limits are the library's."""
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None


def counted(value: str) -> int:
    """A whole number, 1 or more."""
    number = whole(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1; give 1 or more")
    return number


def port(value: str) -> int:
    """A TCP port; 0 is any."""
    number = whole(value)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port; give one from 0 to 65535")
    return number


def decimal(value: str) -> float:
    """A number; the limits are the library's."""
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None


def json_object(value: str) -> dict[str, Any]:
    """An object in JSON."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{value!r} is no JSON object such as {{"enable_thinking": false}}')
    return found


def speed(value: str) -> float:
    """A number above 0."""
    number = decimal(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not above 0; give a speed in gigabytes a second, such as 12.5")
    return number


def yes_or_no(value: str) -> bool:
    """A switch written as an environment variable."""
    try:
        return _WORDS_FOR[value.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(
            f"{value!r} is neither yes nor no; give one of {', '.join(_WORDS_FOR)}"
        ) from None


def one_of(*names: str) -> Callable[[str], str]:
    """One of a few words."""

    def named(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"{value!r} is not known; give one of {', '.join(names)}")
        return value

    return named


def batch_size(value: str) -> str | int:
    """How many sequences to decode together: a number, or auto."""
    size = value.strip().lower()
    if size != "auto" and not size.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is no size of a batch; give auto, or a number such as 16")
    return size if size == "auto" else counted(size)


def device(value: str) -> str:
    """Where to compute."""
    if not _DEVICE.fullmatch(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not known; give one of auto, cpu, cuda, cuda:N")
    return value


def expert_cache(value: str) -> str | int:
    """The size of the expert cache as the library takes it: a number of slots as an int, all else as text."""
    size = value.strip()
    if size.isdecimal():
        return int(size)
    if size.lower() == "auto" or _SHARE.fullmatch(size):
        return size
    try:
        parse_bytes(size)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a size; give auto, bytes such as 6GiB, a share of the experts such as 40%, "
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
                f"{value!r} is not a share; give auto, off, or a share of the missing experts such as 35% or 0.35"
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


def add_settings(parser: Parser, *groups: str) -> None:
    """The settings of an engine in `groups`, as `EngineConfig` defines them."""
    for name in settings_of(*groups):
        add_setting(parser, name)


def add_setting(parser: Parser, name: str) -> None:
    """One setting of an engine."""
    info = settings_of()[name]
    help = info.help.replace("%", "%%")
    if _KINDS[name] is yes_or_no:
        parser.switch(*flags_of(name), help=help)
    else:
        parser.option(*flags_of(name), convert=_KINDS[name], metavar=info.metavar, help=help)


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
        help="folder, GGUF file or hub name of a checkpoint, such as org/name or org/name:Q4_K_M for GGUF files; "
        "without it, the small demo model that ships with edgemoe",
    )


def add_offline_option(parser: Parser) -> None:
    """Where a model may come from."""
    parser.switch("--offline", help=settings_of()["offline"].help)


def add_sampling_options(parser: Parser) -> None:
    """How to choose tokens. Without an option, the checkpoint's own setting holds."""
    parser.option("-n", "--max-tokens", convert=whole, metavar="N", help="most tokens to generate for a reply")
    parser.option("--temp", convert=decimal, metavar="T", help="temperature; 0 always takes the likeliest token")
    parser.option("--top-k", convert=whole, metavar="K", help="choose among the K likeliest tokens")
    parser.option("--top-p", convert=decimal, metavar="P", help="choose among the likeliest tokens that sum up to P")
    parser.option("--min-p", convert=decimal, metavar="P", help="leave out tokens below P times the likeliest one")
    parser.option("--repeat-penalty", convert=decimal, metavar="X", help="make tokens already there less likely")
    parser.option("--presence-penalty", convert=decimal, metavar="X", help="lower what the reply has already")
    parser.option("--frequency-penalty", convert=decimal, metavar="X", help="the same for each time it has it")
    parser.option("--seed", convert=whole, metavar="N", help="start of the random numbers, for the same text again")
    parser.option("--stop", convert=words, metavar="TEXT", help="end the reply before TEXT; repeatable", repeated=True)
    parser.switch("--ignore-eos", help="go on after the model's end of text, up to --max-tokens")


def add_generation_options(parser: Parser) -> None:
    """Everything that generating takes: the model, the sampling, the system prompt, and what is said of it."""
    parser.option("-sys", "--system-prompt", convert=words, metavar="TEXT", help="system prompt of conversations")
    parser.option(
        "--chat-template-kwargs",
        convert=json_object,
        metavar="JSON",
        help='variables of the chat template, such as {"enable_thinking": false}',
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
    arguments = parser.parse_args(argv)
    arguments.parser.fill_from_environment(arguments, environment)
    return arguments
