"""The help of a command: its options in sections, in a short form and a complete one."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Mapping

SECTIONS = {
    "arguments": "",
    "request": "",
    "results": "",
    "model": "",
    "memory and speed": "",
    "sampling": "Without an option, the checkpoint's generation_config.json decides.",
    "drafts": "Drafts make replies faster and do not change them.",
    "lossy": "These change replies; 'edgemoe eval' measures by how much.",
    "options": "",
}
"""The sections of a page in their order, and what each says of its options together."""
_MAX_WIDTH, _MIN_WIDTH = 100, 30
_MAX_HELP_COLUMN = 28


class HelpFormatter(argparse.HelpFormatter):
    """Fits the terminal; wraps descriptions line by line, so that lists stay lists."""

    def __init__(self, prog: str, variables: Mapping[str, str] | None = None) -> None:
        self.columns = max(_MIN_WIDTH, min(shutil.get_terminal_size().columns - 2, _MAX_WIDTH))
        super().__init__(prog, max_help_position=_MAX_HELP_COLUMN, width=self.columns)
        self._variables = variables or {}

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line.strip(), width, initial_indent=begin, subsequent_indent=begin + "     " * bool(given))
            for line in text.splitlines()
            for given in [line[: len(line) - len(line.lstrip())]]
            for begin in [indent + given]
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-p, --prompt TEXT`, where argparse would name the value twice."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        variable = self._variables.get(action.dest)
        return f"{action.help} [{variable}]" if variable else action.help


def page(
    parser: argparse.ArgumentParser,
    groups: Iterable[tuple[str, list[argparse.Action]]],
    variables: Mapping[str, str],
    note: str,
) -> str:
    """The help of `parser`: `groups` of its options by section, `variables` beside them, and `note` at the end."""
    formatter = HelpFormatter(parser.prog, variables)
    usage = textwrap.wrap(f"usage: {parser.prog} {_takes(parser)}", formatter.columns, subsequent_indent=" " * 7)
    formatter.add_usage("\n".join(usage), [], [], prefix="")
    formatter.add_text(parser.description)
    for title, actions in groups:
        formatter.start_section(title)
        formatter.add_text(SECTIONS.get(title) or None)
        formatter.add_arguments(actions)
        formatter.end_section()
    formatter.add_text(note or None)
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def _takes(parser: argparse.ArgumentParser) -> str:
    """What follows the command's name."""
    words = ["[OPTIONS]"]
    for action in parser._actions:
        if not action.option_strings:
            metavar = str(action.metavar)
            words.append({"*": f"[{metavar} ...]", argparse.PARSER: f"{metavar} ..."}.get(str(action.nargs), metavar))
    return " ".join(words)
