"""The settings of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from edgemoe.config import MIB
from edgemoe.errors import EdgeMoEError


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, whom it serves, and its limits. Raises EdgeMoEError for what would be unsafe."""

    host: str = "127.0.0.1"
    """Address or name to listen at. Any but the loopback's needs a key."""
    port: int = 8080
    """0 takes a free one."""
    api_keys: frozenset[str] = frozenset()
    """Keys of which every request must have one; empty serves everybody who reaches the address."""
    allow_origins: tuple[str, ...] = ()
    """Web pages of other origins that may use the server, such as "https://app.example"; "*" is all."""
    aliases: frozenset[str] = frozenset()
    """Other names that requests may give the model; "*" is any."""
    max_running: int = 64
    """Most replies that the engine works at; others wait, and each request has its turn."""
    max_queue: int = 512
    """Most requests that are answered or wait; more are refused with 429."""
    max_body: int = 8 * MIB
    """Bytes of a request's body."""
    heartbeat: float = 10.0
    """Seconds without an event of a stream until one says that the server is at work."""
    stall_timeout: float = 60.0
    """Seconds after which a client that reads nothing of its stream, or sends nothing of its request, is cut off."""
    shutdown_timeout: float = 5.0
    """Seconds that connections have to take the end of their streams when the server ends."""

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.api_keys:
            raise EdgeMoEError(
                f"at {self.host or 'all addresses'} others can reach the server, and it has no key: give one as "
                "api_key=, or listen at 127.0.0.1"
            )
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise EdgeMoEError("a key must be ASCII text that is not blank: give another as api_key=")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, and no other machine's."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
