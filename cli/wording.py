"""Messages of the library in the words of the terminal: settings become options."""

from __future__ import annotations

import re

from edgemoe.cli.arguments import flags_of
from edgemoe.config import settings_of

_OTHERS = {
    "model": "-m",
    "against": "--against",
    "tokens": "--tokens",
    "address": "--ray",
    "resume": "--resume",
    "api_key": "--api-key",
    "host": "--host",
    "port": "--port",
    "max_body": "--max-body",
}
"""Arguments of the library that are no settings of an engine."""


def in_options(message: str) -> str:
    """`message` with every argument of the library, such as context= or device='cpu', written as an option."""
    options = {name: flags_of(name)[-1] for name in settings_of()} | _OTHERS
    pattern = rf"(?<![\w.-])(as )?({'|'.join(sorted(options, key=len, reverse=True))})=('[\w+]+'(?!\w))?(?=(\S)?)"

    def option(found: re.Match[str]) -> str:
        given, name, word, following = found.groups()
        value = word.strip("'") if word else ""
        # A value that is not a plain word in quotes stays as the message has it.
        space = " " if value or (following or "").isalnum() or (following or "") in ("'", "-") else ""
        # "Give it as model=" of the library is "give it with -m" at a terminal.
        return f"{'with ' if given else ''}{options[name]}{space}{value}"

    return re.sub(pattern, option, message)
