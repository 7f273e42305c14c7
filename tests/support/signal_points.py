"""The instructions at which Python tells a program of a signal: where an interrupt may come."""

from __future__ import annotations

import dis
from types import FrameType


class SignalPoints:
    """Finds them among the events of a trace: the first instruction of a function, and what follows calls and loops."""

    def __init__(self) -> None:
        self._before: dict[int, str] = {}
        """The instruction before, by the frame's number."""

    def has(self, frame: FrameType, event: str) -> bool:
        """Whether a signal may be told at this event. To be asked at each one of a frame; has its opcodes traced."""
        frame.f_trace_opcodes = True
        if event in ("call", "return"):
            self._before.pop(id(frame), None)
        if event != "opcode":
            return False
        now = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        before, self._before[id(frame)] = self._before.get(id(frame), ""), now
        return now == "RESUME" or before.startswith("CALL") or "JUMP_BACKWARD" in before
