"""What a chat works on: an engine, a conversation, and how replies are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgemoe.checkpoint.chat_template import ChatPrompt
from edgemoe.cli.chat.conversation import Conversation
from edgemoe.cli.surface import EngineView
from edgemoe.sampling import Sampling

if TYPE_CHECKING:
    from edgemoe import Timings


@dataclass
class Session:
    """What the commands of a chat work on. `attached` waits for the next message."""

    engine: EngineView
    conversation: Conversation
    sampling: Sampling
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""
    attached: list[str] = field(default_factory=list)
    timings: Timings | None = None
    shifts: bool = False
    """Whether the oldest messages are left out when the context is full."""

    @property
    def prompt(self) -> ChatPrompt:
        """The conversation as it stands, to be replied to."""
        return ChatPrompt(self.conversation.messages, self.template_kwargs)

    @property
    def context(self) -> int:
        """Most tokens of a conversation, the reply included."""
        return self.engine.plan.context
