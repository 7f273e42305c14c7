"""`edgemoe chat`: a conversation on a terminal; one answer where a question is given or standard input is piped."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from io import TextIOWrapper

from edgemoe import __version__
from edgemoe.cli.arguments import sampling_from
from edgemoe.cli.chat.answer import ask
from edgemoe.cli.chat.context_use import cut_note, make_room
from edgemoe.cli.chat.conversation import Conversation
from edgemoe.cli.chat.line_editing import line_editing
from edgemoe.cli.chat.message_input import input_pending
from edgemoe.cli.chat.repl import Repl
from edgemoe.cli.chat.reply_view import ReplyView
from edgemoe.cli.chat.session import Session
from edgemoe.cli.chat.text_file import piped_text, read_text
from edgemoe.cli.exits import Exit, UsageError
from edgemoe.cli.loading import open_engine, say_lossy
from edgemoe.cli.output import put, say
from edgemoe.cli.render import Counts, measured
from edgemoe.cli.surface import EngineFactory
from edgemoe.errors import CheckpointError


def chat(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Chat. Raises UsageError and FileTrouble before loading, and what loading or a single answer raises."""
    sampling = sampling_from(arguments)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    opening = _opening(arguments, terminal)
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal or file in another encoding shall not end a reply half-way.
        sys.stdout.reconfigure(errors="replace")
    with closing(open_engine(arguments, engine)) as loaded:
        if not loaded.has_chat_template:
            raise CheckpointError(f"{loaded.plan.model} has no chat template; complete raw prompts with 'edgemoe run'")
        say_lossy(loaded.plan)
        variables = arguments.chat_template_kwargs or {}
        conversation = Conversation(arguments.system_prompt)
        session = Session(loaded, conversation, sampling, variables, shifts=bool(arguments.context_shift))
        if terminal and not arguments.question:
            return _converse(session, opening, verbose=bool(arguments.verbose))
        assert opening is not None
        return _answer_once(session, opening, verbose=bool(arguments.verbose))


def _opening(arguments: argparse.Namespace, terminal: bool) -> str | None:
    """The first message: -p's text, -f's, what is piped in, and the question. None where none is needed.

    `terminal`: standard input is one, so that nothing is piped in.
    """
    parts = [arguments.prompt, read_text(arguments.file) if arguments.file is not None else None]
    if not terminal:
        parts.append(piped_text())
    parts.append(" ".join(arguments.question))
    message = "\n".join(part for part in parts if part)
    if not message.strip() and arguments.question:
        raise UsageError("the question is empty; give one, or none for a conversation")
    if not message.strip() and not terminal:
        raise UsageError("there is no message: standard input is empty; give one with -p, or start it from a terminal")
    return message or None


def _answer_once(session: Session, message: str, *, verbose: bool) -> int:
    """One answer on standard output, and nothing else there."""
    session.conversation.say(message)
    make_room(session)
    before = Counts.of(session.engine.stats)
    view = ReplyView(put, terminal=sys.stdout.isatty())
    try:
        answer, interrupted = ask(session.engine, session.prompt, session.sampling, view.add)
    finally:
        view.close()
    put("" if answer.text.endswith("\n") else "\n")
    cut = cut_note(session, answer, once=True)
    if cut:
        say(cut)
    if verbose:
        for line in measured(answer.timings, session.engine.stats, before):
            say(line)
    if interrupted:
        raise KeyboardInterrupt
    return Exit.OK


def _converse(session: Session, opening: str | None, *, verbose: bool) -> int:
    say(f"{__version__}, {session.engine.plan.model}; /help lists the commands, Ctrl-D leaves")
    with line_editing():
        repl = Repl(
            session, read_line=_read_line, out=sys.stdout, err=sys.stderr, verbose=verbose, pending=input_pending
        )
        repl.run(opening)
    return Exit.OK


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    # Python would write the prompt to standard output, where only replies belong.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()
