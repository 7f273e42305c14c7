"""How much of the context a conversation takes, and what can be done when it is full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.cli.exits import FileTrouble
from edgemoe.cli.render import counted
from edgemoe.errors import RequestError
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from edgemoe import Completion
    from edgemoe.cli.chat.session import Session

_MAX_TOKEN_BYTES = 256
"""Bytes of text that a token may stand for. A text beyond that many for each token of the context is not tokenized."""
_ROOM_SHARE = 4
"""When messages are left out, so that a reply has 1 / _ROOM_SHARE of the context."""


_UNCOUNTED = 1 << 62
"""In the place of a count of tokens that is far beyond the context."""


class ContextFull(RequestError):
    """The conversation does not fit the context."""


def used(session: Session, more: str | None = None) -> int | None:
    """Tokens of the conversation, with the message `more` where it is given.

    None where that cannot be told: the template refuses the conversation, such as an empty one.
    """
    messages = session.conversation.messages
    return _tokens(session, messages if more is None else [*messages, {"role": "user", "content": more}])


def shown(session: Session) -> str:
    """The use of the context, such as `120 of 512 tokens`."""
    return f"{_count(session, used(session) or 0)} of {counted(session.context, 'token')}"


def make_room(session: Session) -> str:
    """Check that a reply to the conversation fits, or leave its oldest turns out where the session shifts.

    Returns a line that says what was left out; empty where nothing was. Raises ContextFull, and then has changed
    nothing.
    """
    tokens = used(session)
    room = min(session.sampling.max_tokens or session.context, session.context // _ROOM_SHARE) if session.shifts else 1
    if tokens is None or tokens + room <= session.context:
        return ""
    if session.shifts:
        conversation = session.conversation
        for turns in range(1, conversation.turns):
            messages = conversation.messages_without(turns)
            tokens = _tokens(session, messages)
            if tokens is not None and tokens + room <= session.context:
                left_out = conversation.leave_out(turns)
                return (
                    f"(context full: the oldest {counted(left_out, 'message')} left out, now {tokens} of "
                    f"{session.context} tokens)"
                )
    if tokens is not None and tokens < session.context:
        return ""
    raise ContextFull(_full(session, tokens))


def _full(session: Session, tokens: int | None) -> str:
    taken = f"context full: this message would make it {_count(session, tokens)} of {session.context} tokens"
    alone = session.conversation.turns <= 1
    if alone or session.shifts:
        return f"{taken}, the reply not counted: send a shorter one, or start with a larger --ctx-size"
    return (
        f"{taken}, the reply not counted: make room with /undo or /clear, or start with a larger --ctx-size or with "
        "--context-shift"
    )


def cut_note(session: Session, answer: Completion, *, once: bool = False) -> str:
    """A line that says why a reply ended before its end; empty where it did not, or where the user set its length.

    `once`: there is no conversation that goes on.
    """
    if answer.finish_reason != "length":
        return ""
    timings = answer.timings
    tokens = timings.prompt_tokens + timings.generated_tokens
    if tokens < session.context:
        if session.sampling.max_tokens is not None:
            return ""
        more = "-n allows more" if once else "-n or /set max_tokens allow more"
        return f"(the reply was cut at {counted(timings.generated_tokens, 'token')}; {more})"
    full = f"(the reply was cut: context full, {tokens} of {session.context} tokens; "
    if once:
        return full + "start with a larger --ctx-size)"
    if session.shifts:
        return full + "the next message leaves the oldest out)"
    return full + "/undo or /clear make room, or start with a larger --ctx-size or with --context-shift)"


def check_attachment(session: Session, name: str, text: str) -> None:
    """Raises FileTrouble for a text that cannot stand before the next message, because the context is too small."""
    limit = session.context * _MAX_TOKEN_BYTES
    nbytes = len(text.encode("utf-8", "replace"))
    larger = "give a shorter text, or start with a larger --ctx-size"
    if nbytes > limit:
        raise FileTrouble(
            f"{name} has {format_bytes(nbytes)}, too much for a context of {session.context} tokens: {larger}"
        )
    attached = "\n".join([*session.attached, text, ""])
    system = session.conversation.messages_without(session.conversation.turns)
    alone = _tokens(session, [*system, {"role": "user", "content": attached}])
    if alone is not None and alone >= session.context:
        raise FileTrouble(
            f"{name} does not fit: it makes {_count(session, alone)} of {session.context} tokens; {larger}"
        )
    tokens = used(session, attached)
    if not session.shifts and tokens is not None and tokens >= session.context:
        raise FileTrouble(
            f"{name} does not fit: with it the conversation has {_count(session, tokens)} of {session.context} "
            "tokens; make room with /undo or /clear, or start with a larger --ctx-size or with --context-shift"
        )


def _count(session: Session, tokens: int | None) -> str:
    return f"more than {session.context}" if tokens is None or tokens == _UNCOUNTED else str(tokens)


def _tokens(session: Session, messages: list[dict[str, str]]) -> int | None:
    if sum(len(message["content"]) for message in messages) > session.context * _MAX_TOKEN_BYTES:
        return _UNCOUNTED
    try:
        return len(session.engine.chat_prompt(messages, session.template_kwargs))
    except RequestError:
        return None
