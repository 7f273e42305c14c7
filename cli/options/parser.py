"""The parser of a command: errors in one sentence with a suggestion, options that the environment can set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from edgemoe.cli.exits import UsageError
from edgemoe.cli.options.help_page import SECTIONS, HelpFormatter, page
from edgemoe.cli.options.suggestions import closest, did_you_mean

PREFIX = "EDGEMOE_"
WITHOUT_OPTION = ("EDGEMOE_TRACEBACK", "EDGEMOE_BENCH_DIR", "EDGEMOE_BENCH_OTHER", "EDGEMOE_LLAMA_CPP")
"""Variables that stand for no option; all but the first are read by the measurements in a checkout."""
_MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


class Variable(NamedTuple):
    """An environment variable, the option it stands in for, and whether that option is a list."""

    name: str
    option: str
    convert: Callable[[str], Any]
    listed: bool


class _ShowHelp(argparse.Action):
    """Prints the help and leaves: the short one for -h, the complete one for --help."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        assert isinstance(parser, Parser)
        sys.stdout.write(parser.help_page(full=option != "-h"))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and whose options can come from the environment."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, add_help=False, **settings)
        self._variables: list[Variable] = []
        self._sections: dict[str, list[argparse.Action]] = {}
        self._rare: set[str] = set()
        shown = self.add_argument(
            "-h", "--help", action=_ShowHelp, nargs=0, dest="help", default=argparse.SUPPRESS,
            help="show the most used options (-h), or all of them (--help)",
        )  # fmt: skip
        self._sections["options"] = [shown]

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and leaving the process."""
        raise UsageError(f"{message}; see '{self.prog} --help'")

    def version(self, text: str) -> None:
        """Add --version, which prints `text` and leaves."""
        action = self.add_argument("--version", action="version", version=text, help="show the version")
        self._sections["options"].append(action)

    def option(
        self,
        *names: str,
        convert: Callable[[str], Any],
        metavar: str,
        help: str,
        repeated: bool = False,
        section: str = "options",
        rare: bool = False,
    ) -> None:
        """Add an option with a value; the last name gives the environment variable its name.

        The help lists it in `section`; a rare one is left out of the short help.
        """
        action = self.add_argument(
            *names, type=convert, metavar=metavar, action="append" if repeated else "store", help=help
        )
        self._list(action, Variable(_variable_for(names), action.dest, convert, repeated), section, rare)

    def switch(self, *names: str, help: str, section: str = "options", rare: bool = False) -> None:
        """Add an option without a value; its environment variable is 1 or 0."""
        action = self.add_argument(*names, action="store_true", default=None, help=help)
        self._list(action, Variable(_variable_for(names), action.dest, yes_or_no, False), section, rare)

    def _list(self, action: argparse.Action, variable: Variable, section: str, rare: bool) -> None:
        self._variables.append(variable)
        # What every command has stays last.
        listed = self._sections.setdefault(section, [])
        listed.insert(len(listed) - (section == "options"), action)
        if rare:
            self._rare.add(action.dest)

    # --- help ------------------------------------------------------------------------------------

    def format_help(self) -> str:
        """The complete help."""
        return self.help_page(full=True)

    def help_page(self, *, full: bool) -> str:
        """The help: all options with their variables, or those that are used most."""
        variables = {variable.option: variable.name for variable in self._variables} if full else {}
        note = ""
        if self._rare and not full:
            note = f"'{self.prog} --help' lists {len(self._rare)} more options, and the variable of each."
        return page(self, self._groups(full), variables, note)

    def _groups(self, full: bool) -> Iterator[tuple[str, list[argparse.Action]]]:
        positional = [action for action in self._actions if not action.option_strings]
        sections = {"commands" if positional and positional[0].choices else "arguments": positional, **self._sections}
        order = list(SECTIONS)
        for title in sorted(sections, key=lambda title: order.index(title) if title in order else 0):
            shown = [action for action in sections[title] if full or action.dest not in self._rare]
            if shown:
                yield title, shown

    # --- reading ---------------------------------------------------------------------------------

    def read(self, argv: Sequence[str] | None, environment: Mapping[str, str]) -> argparse.Namespace:
        """Parse, then fill in from the environment. The chosen command's parser is its `parser` default.

        Raises UsageError, which names what was most likely meant.
        """
        words = sys.argv[1:] if argv is None else list(argv)
        self._check_order(words)
        self._check_command(words)
        arguments, left = self.parse_known_args(words)
        command: Parser = arguments.parser
        if left:
            command.error(f"unrecognized arguments: {cut(' '.join(left))}{self._meant(left[0], command)}")
        command.fill_from_environment(arguments, environment)
        return arguments

    def commands(self) -> dict[str, Parser]:
        """The parsers of its commands."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def _check_order(self, words: Sequence[str]) -> None:
        """Refuses an option of a command before the command."""
        flag = words[0].partition("=")[0] if words else ""
        takers = [name for name, command in self.commands().items() if flag in command._option_string_actions]
        if not takers or flag in self._option_string_actions:
            return
        named = next((word for word in words if word in takers), takers[0])
        self.error(f"{flag} is an option of a command and stands after it: {self.prog} {named} {flag}")

    def _check_command(self, words: Sequence[str]) -> None:
        """Refuses what is no command before argparse does, which would list them all."""
        known = self.commands()
        given = next((word for word in words if not word.startswith("-")), None)
        if given is None or given in known:
            return
        if " " in given.strip():
            self.error(f"{cut(given)!r} is no command (to ask a model: {self.prog} chat {cut(given)!r})")
        self.error(f"{cut(given)!r} is no command; there are {', '.join(known)}{did_you_mean(given, known)}")

    def _meant(self, word: str, command: Parser) -> str:
        """A suggestion for an argument that `command` does not know."""
        if not word.startswith("-"):
            return " (put a text of several words in quotes)" if command is not self else ""
        meant = did_you_mean(word, command._long_names())
        flag = word.partition("=")[0]
        others = [name for name, other in self.commands().items() if flag in other._option_string_actions]
        return f" (an option of {', '.join(others)})" if others else meant

    def _long_names(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    # --- environment -----------------------------------------------------------------------------

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

    def unknown_variables(self, environment: Mapping[str, str]) -> list[str]:
        """A sentence for each variable of the environment that looks like an option of some command and is none."""
        known = {variable.name for parser in self.commands().values() for variable in parser._variables}
        known |= set(WITHOUT_OPTION)
        by_name = {name.removeprefix(PREFIX): name for name in sorted(known)}
        sentences = []
        for name in sorted(name for name in environment if name.startswith(PREFIX) and name not in known):
            meant = closest(name.removeprefix(PREFIX), by_name)
            suggestion = f" (did you mean {by_name[meant]}?)" if meant is not None else ""
            sentences.append(f"the variable {cut(name)} is not known and does nothing{suggestion}")
        return sentences


def cut(text: str) -> str:
    """`text`, shortened where a message would be lost in it."""
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


_WORDS_FOR = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def yes_or_no(value: str) -> bool:
    """A switch written as an environment variable."""
    try:
        return _WORDS_FOR[value.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(
            f"{cut(value)!r} is neither yes nor no; give one of {', '.join(_WORDS_FOR)}"
        ) from None


def _variable_for(names: Sequence[str]) -> str:
    return PREFIX + names[-1].lstrip("-").replace("-", "_").upper()
