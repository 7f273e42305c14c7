"""The interactive chat: reads lines, sends messages, streams replies. What a command does is in `slash`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from edgemoe.cli.chat.answer import ask
from edgemoe.cli.chat.context_use import cut_note, make_room
from edgemoe.cli.chat.message_input import Message, MessageInput
from edgemoe.cli.chat.reply_view import ReplyView
from edgemoe.cli.chat.session import Session
from edgemoe.cli.chat.slash import Next, execute
from edgemoe.cli.interruption import KeyboardInterrupts
from edgemoe.cli.render import Counts, counted, harmless, harmless_line, measured
from edgemoe.cli.wording import in_options
from edgemoe.errors import EdgeMoEError

if TYPE_CHECKING:
    from edgemoe import Completion


class Repl:
    """A chat between a person and a model: replies go to `out`, everything else to `err`.

    `read_line` shows a prompt and returns a line; it raises EOFError at the end and KeyboardInterrupt on Ctrl-C.
    `pending` waits so many seconds for more input, and says whether there is any.
    """

    def __init__(
        self,
        session: Session,
        *,
        read_line: Callable[[str], str],
        out: TextIO,
        err: TextIO,
        verbose: bool = False,
        pending: Callable[[float], bool] = lambda seconds: False,
    ) -> None:
        self._session = session
        self._input = MessageInput(read_line, pending)
        self._out = out
        self._err = err
        self._verbose = verbose
        self._interrupts = KeyboardInterrupts()

    def run(self, opening: str | None = None) -> None:
        """Chat until the person leaves, beginning with the opening message where there is one."""
        then = Next.READ
        with self._interrupts as interrupts:
            while then is not Next.LEAVE:
                try:
                    with interrupts.allowed():
                        if opening is None:
                            then = self._take(self._input.read())
                        else:
                            text, opening = opening, None
                            self.send(text)
                except KeyboardInterrupt:
                    self._note("")
                except EOFError:
                    self._note("")
                    return
                except UnicodeDecodeError:
                    self._complain("that line is not UTF-8 text")

    def send(self, text: str) -> None:
        """Send a message and stream its reply. Without a reply, the message is not kept."""
        session = self._session

        def say() -> None:
            session.conversation.say("\n".join([*session.attached, text]))
            session.attached.clear()

        answer = self._reply(say)
        if answer is not None and not answer.text:
            self._note("(no reply came, so the message is not kept)")

    def reply_again(self) -> None:
        """Give another reply to the last message. Without one, the old reply stays."""
        self._reply(self._session.conversation.take_reply)

    def _take(self, message: Message) -> Next:
        text, quoted = message
        if not text.strip():
            return Next.READ
        if quoted or not text.startswith("/"):
            self.send(text)
            return Next.READ
        try:
            outcome = execute(text, self._session)
            if outcome.text:
                self._note(outcome.text)
            if outcome.then is Next.REPLY_AGAIN:
                self.reply_again()
            return outcome.then
        except EdgeMoEError as error:
            self._complain(in_options(str(error)))
            return Next.READ

    def _reply(self, begin: Callable[[], object]) -> Completion | None:
        """Has `begin` change the conversation, and adds a reply to it; without one, all stays as it was.

        Returns None where that failed (which is said) or was broken off.
        """
        session = self._session
        before, restore = Counts.of(session.engine.stats), session.conversation.kept()
        attached = list(session.attached)
        answer = None
        try:
            try:
                begin()
                answer = self._stream()
            finally:
                # The exchange is kept or taken back as a whole; an interrupt that comes just before this does so too.
                self._interrupts.forbid()
        finally:
            if answer is not None and answer.text:
                session.conversation.reply(answer.text, answer.reasoning)
            else:
                restore()
                session.attached[:] = attached
        if answer is not None:
            self._tell(answer, before)
        return answer

    def _stream(self) -> Completion | None:
        """Stream a reply to the conversation as it stands; None when that failed (which is said) or was broken off."""
        session = self._session
        view = ReplyView(self._write, terminal=self._out.isatty())
        try:
            self._note_unless_empty(make_room(session))
            return ask(session.engine, session.prompt, session.sampling, view.add).completion
        except (EdgeMoEError, RuntimeError, MemoryError) as error:
            # Whatever goes wrong in a generation (an accelerator's error is a RuntimeError), the conversation goes on.
            self._fail(error)
        except KeyboardInterrupt:
            self._note("")
        finally:
            view.close()
        return None

    def _tell(self, answer: Completion, before: Counts) -> None:
        """Ends the reply's line and says what there is to say about it."""
        session = self._session
        self._write("\n")
        session.timings = answer.timings
        self._note_unless_empty(cut_note(session, answer))
        if self._verbose:
            for line in measured(answer.timings, session.engine.stats, before):
                self._note(line)
            tokens = answer.timings.prompt_tokens + answer.timings.generated_tokens
            self._note(f"context: {tokens} of {counted(session.context, 'token')}")

    def _fail(self, error: Exception) -> None:
        if os.environ.get("EDGEMOE_TRACEBACK") == "1":
            traceback.print_exception(error, file=self._err)
        named = isinstance(error, EdgeMoEError)
        self._complain(in_options(str(error)) if named else f"unexpected {type(error).__name__}: {error}")

    def _complain(self, sentence: str) -> None:
        self._note(f"edgemoe: error: {harmless_line(sentence)}")

    def _note_unless_empty(self, text: str) -> None:
        if text:
            self._note(text)

    def _note(self, text: str) -> None:
        self._err.write(harmless(text) + "\n")
        self._err.flush()

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
