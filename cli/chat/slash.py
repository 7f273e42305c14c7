"""The commands of the chat that begin with a slash. They work on a session and return text; they touch no terminal."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields, replace
from enum import Enum
from typing import Any, NamedTuple

from edgemoe.cli.chat.context_use import check_attachment, shown
from edgemoe.cli.chat.session import Session
from edgemoe.cli.chat.text_file import read_text
from edgemoe.cli.options.parser import cut
from edgemoe.cli.options.suggestions import did_you_mean
from edgemoe.cli.options.values import decimal, whole
from edgemoe.cli.render import columns, counted, speeds, totals
from edgemoe.errors import EdgeMoEError
from edgemoe.sampling import Sampling


class SlashError(EdgeMoEError):
    """A command that is not known, or that cannot take what it was given."""


class Next(Enum):
    """What the chat does after a command."""

    READ = "read the next line"
    REPLY_AGAIN = "give another reply to the last message"
    LEAVE = "leave"


class CommandResult(NamedTuple):
    """What a command has to say, and what comes next."""

    text: str = ""
    then: Next = Next.READ


class Command(NamedTuple):
    """A command: its names, what it takes (none when empty), what it does."""

    names: tuple[str, ...]
    takes: str
    help: str
    run: Callable[[Session, str], CommandResult]


def execute(line: str, session: Session) -> CommandResult:
    """Carry out a line that begins with a slash. Raises EdgeMoEError and then has changed nothing."""
    name, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    for command in COMMANDS:
        if name in command.names:
            if argument and not command.takes:
                raise SlashError(f"{name} takes nothing, but was given {cut(argument)!r}")
            if not argument and command.takes and not command.takes.startswith("["):
                raise SlashError(f"{name} needs something: {name} {command.takes}")
            return command.run(session, argument)
    meant = did_you_mean(name, [each for command in COMMANDS for each in command.names])
    sent = cut(line.strip())
    raise SlashError(f'unknown command {cut(name)}{meant}; /help lists them, and """{sent}""" sends it as a message')


def _help(session: Session, argument: str) -> CommandResult:
    rows = [(" ".join((", ".join(command.names), command.takes)), command.help) for command in COMMANDS]
    rows.append(('"""', 'begin a message of several lines; the next """ ends it'))
    rows.append(("Ctrl-C", "stop the reply, or clear the line"))
    rows.append(("Ctrl-D", "leave"))
    return CommandResult(columns(rows))


def _leave(session: Session, argument: str) -> CommandResult:
    return CommandResult(then=Next.LEAVE)


def _clear(session: Session, argument: str) -> CommandResult:
    session.conversation.clear()
    session.attached.clear()
    return CommandResult("The conversation is empty.")


def _regen(session: Session, argument: str) -> CommandResult:
    return CommandResult(then=Next.REPLY_AGAIN)


def _undo(session: Session, argument: str) -> CommandResult:
    return CommandResult(f"Took back: {session.conversation.undo()}")


def _save(session: Session, argument: str) -> CommandResult:
    session.conversation.save(argument)
    return CommandResult(f"Saved to {argument}.")


def _load(session: Session, argument: str) -> CommandResult:
    session.conversation.load(argument)
    session.attached.clear()
    return CommandResult(f"Loaded {counted(len(session.conversation.messages), 'message')} from {argument}.")


def _system(session: Session, argument: str) -> CommandResult:
    session.conversation.system = argument or None
    return CommandResult("The system prompt is set." if argument else "There is no system prompt now.")


def _set(session: Session, argument: str) -> CommandResult:
    key, *rest = argument.split(maxsplit=1)
    name = _KEYS.get(key.replace("-", "_"))
    if name is None:
        meant = did_you_mean(key, SETTINGS)
        raise SlashError(f"there is no setting {cut(key)}{meant}; there are {', '.join(SETTINGS)}")
    if not rest:
        raise SlashError(f"give a value: /set {key} VALUE, or /set {key} default")
    session.sampling = replace(session.sampling, **{name: _value(name, rest[0])})
    return CommandResult(f"{name} = {_shown(name, session.sampling)}")


def _show(session: Session, argument: str) -> CommandResult:
    plan = session.engine.plan
    rows = [
        ("model", plan.model),
        ("device", plan.device),
        ("dtype", plan.dtype),
        ("context", shown(session)),
        ("messages", str(len(session.conversation.messages))),
        ("system", session.conversation.system or "none"),
    ]
    rows += [(name, _shown(name, session.sampling)) for name in SETTINGS]
    return CommandResult(columns(rows))


def _stats(session: Session, argument: str) -> CommandResult:
    text = f"{columns(totals(session.engine.stats))}\ncontext: {shown(session)}"
    if session.timings is not None:
        text += f"\nlast reply: {speeds(session.timings)}"
        text += f"\nfirst token after {session.timings.time_to_first_token:.3f} s"
    return CommandResult(text)


def _read(session: Session, argument: str) -> CommandResult:
    text = read_text(argument)
    check_attachment(session, argument, text)
    session.attached.append(text)
    return CommandResult(f"Read {counted(len(text), 'character')} from {argument}; they go before your next message.")


COMMANDS = (
    Command(("/help", "/?"), "", "show this", _help),
    Command(("/exit", "/quit", "/bye"), "", "leave", _leave),
    Command(("/clear",), "", "forget the conversation, keep the system prompt", _clear),
    Command(("/regen", "/retry"), "", "give another reply to the last message", _regen),
    Command(("/undo",), "", "take back the last message and its reply", _undo),
    Command(("/save",), "FILE", "save the conversation", _save),
    Command(("/load",), "FILE", "go on with a saved conversation", _load),
    Command(("/system",), "[TEXT]", "set the system prompt; without TEXT, remove it", _system),
    Command(("/set",), "KEY VALUE", "change a setting of the sampling", _set),
    Command(("/show",), "", "show the model and the settings", _show),
    Command(("/stats",), "", "show what the engine counted", _stats),
    Command(("/read",), "FILE", "put a file's text before the next message", _read),
)
"""Every command, in the order of /help."""


# --- settings ------------------------------------------------------------------------------------

_NOT_SET = ("logprobs", "logit_bias", "skip_special_tokens", "response_format")
"""What a chat has no place to show, ids of tokens, and what would mix the reply with its marks."""
SETTINGS = tuple(entry.name for entry in fields(Sampling) if entry.name not in _NOT_SET)
"""What /set changes."""

_KEYS = {name: name for name in SETTINGS} | {"temp": "temperature", "repeat_penalty": "repetition_penalty"}
_WHOLE = ("top_k", "seed", "max_tokens")


def _value(name: str, text: str) -> Any:
    """A setting's value from its text; `default` is whatever the checkpoint says."""
    if text == "default":
        return {entry.name: entry.default for entry in fields(Sampling)}[name]
    if name == "stop":
        return _stop(text)
    if name == "ignore_eos":
        if text not in ("true", "false"):
            raise SlashError(f"{name} is true or false, not {cut(text)!r}")
        return text == "true"
    try:
        return whole(text) if name in _WHOLE else decimal(text)
    except ArgumentTypeError as error:
        if text.strip().lstrip("+-").isdecimal():
            raise SlashError(f"{name}={error}") from None
        kind = "a whole number" if name in _WHOLE else "a number"
        raise SlashError(f"{name} is {kind}, not {cut(text)!r}") from None


def _stop(text: str) -> tuple[str, ...]:
    """One text as it is typed, or JSON where quotes, line ends or several are needed."""
    try:
        value = json.loads(text) if text[0] in '["' else text
    except (ValueError, RecursionError):
        raise SlashError(f'stop is a text, or JSON such as ["a", "b"], not {cut(text)!r}') from None
    texts = [value] if isinstance(value, str) else value
    if not all(isinstance(entry, str) for entry in texts):
        raise SlashError(f"stop is a text, or a list of texts, not {cut(text)!r}")
    return tuple(texts)


def _shown(name: str, sampling: Sampling) -> str:
    value = getattr(sampling, name)
    if value is None:
        return "default"
    return json.dumps(value, ensure_ascii=False) if value != () else "none"
