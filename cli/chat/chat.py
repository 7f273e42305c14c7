"""`edgemoe chat`: an interactive conversation on a terminal, one answer where standard input is piped."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from io import TextIOWrapper

from edgemoe import __version__
from edgemoe.cli.answers import ask
from edgemoe.cli.arguments import sampling_from
from edgemoe.cli.chat.conversation import Conversation
from edgemoe.cli.chat.history import line_editing
from edgemoe.cli.chat.repl import Repl
from edgemoe.cli.chat.slash import Session, read_text
from edgemoe.cli.exits import Exit, FileTrouble, UsageError
from edgemoe.cli.interruption import Interruption
from edgemoe.cli.loading import open_engine, say, say_lossy
from edgemoe.cli.output import put
from edgemoe.cli.render import Counts, measured
from edgemoe.cli.surface import EngineFactory
from edgemoe.errors import CheckpointError


def chat(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Chat. Raises UsageError and FileTrouble before loading, and what loading or a single answer raises."""
    sampling = sampling_from(arguments)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    opening = _opening(arguments, interactive)
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal or file in another encoding shall not end a reply half-way.
        sys.stdout.reconfigure(errors="replace")
    with closing(open_engine(arguments, engine)) as loaded:
        if not loaded.has_chat_template:
            raise CheckpointError(f"{loaded.plan.model} has no chat template; complete raw prompts with 'edgemoe run'")
        say_lossy(loaded.plan)
        variables = arguments.chat_template_kwargs or {}
        session = Session(loaded, Conversation(arguments.system_prompt), sampling, variables)
        if interactive:
            return _converse(session, opening, verbose=bool(arguments.verbose))
        assert opening is not None
        return _answer_once(session, opening, verbose=bool(arguments.verbose))


def _opening(arguments: argparse.Namespace, interactive: bool) -> str | None:
    """The first message: -p's text, then -f's, then what is piped in. None when there is none and none is needed."""
    parts = [arguments.prompt, read_text(arguments.file) if arguments.file is not None else None]
    if not interactive:
        parts.append(piped_text())
    message = "\n".join(part for part in parts if part)
    if not message.strip() and not interactive:
        raise UsageError("there is no message: standard input is empty; give one with -p, or start it from a terminal")
    return message or None


def piped_text() -> str:
    """What comes in on standard input, without the line ends around it. Raises FileTrouble."""
    if sys.stdin is None:  # started with its input closed
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip("\r\n")
    except UnicodeDecodeError:
        raise FileTrouble("standard input is not UTF-8 text; convert it, for example with 'iconv -t UTF-8'") from None


def _answer_once(session: Session, message: str, *, verbose: bool) -> int:
    """One answer on standard output, and nothing else there."""
    session.conversation.say(message)
    before = Counts.of(session.engine.stats)
    with Interruption(session.engine.cancel) as interruption:
        answer = ask(session.engine, session.prompt, session.sampling, interruption, lambda chunk: put(chunk.text))
        put("" if answer.text.endswith("\n") else "\n")
    if verbose:
        for line in measured(answer.timings, session.engine.stats, before):
            say(line)
    if interruption.requested:
        raise KeyboardInterrupt
    return Exit.OK


def _converse(session: Session, opening: str | None, *, verbose: bool) -> int:
    say(f"{__version__}, {session.engine.plan.model}; /help lists the commands, Ctrl-D leaves")
    with line_editing():
        Repl(session, read_line=_read_line, out=sys.stdout, err=sys.stderr, verbose=verbose).run(opening)
    return Exit.OK


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    # Python would write the prompt to standard output, where only replies belong.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()
