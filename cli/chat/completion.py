"""What Tab completes in the chat: commands, the settings of /set, and paths."""

from __future__ import annotations

import os
from collections.abc import Iterator

from edgemoe.cli.chat.slash import COMMANDS, SETTINGS, Command
from edgemoe.cli.chat.text_file import place_of


def completions(line: str, word: str) -> list[str]:
    """What may stand in the place of `word`, the last word of `line`; empty for what is no command."""
    if not line.startswith("/"):
        return []
    name, space, argument = line.partition(" ")
    if not space:
        found = [(each, command) for command in COMMANDS for each in command.names if each.startswith(name)]
        return [f"{each} " if command.takes else each for each, command in found]
    command = next((each for each in COMMANDS if name in each.names), None)
    # A path may have spaces in it: then its last word alone is replaced.
    kept = len(argument) - len(word)
    return [each[kept:] for each in _values(command, argument.lstrip()) if len(each) >= kept] if command else []


def _values(command: Command, argument: str) -> Iterator[str]:
    if command.takes.strip("[]").startswith("FILE"):
        yield from _paths(argument)
    elif command.takes.startswith("KEY") and " " not in argument:
        yield from (f"{key} " for key in SETTINGS if key.startswith(argument.replace("-", "_")))


def _paths(begun: str) -> Iterator[str]:
    """Paths that begin so, folders with a slash at their end. Hidden files only where their dot is typed."""
    folder, name = os.path.split(begun)
    try:
        entries = sorted(os.scandir(place_of(folder or ".")), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return
    for entry in entries:
        if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith(".")):
            yield os.path.join(folder, entry.name) + ("/" if _is_folder(entry) else "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
