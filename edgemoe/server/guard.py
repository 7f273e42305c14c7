"""Who may use the server: checks of the host, the origin and the key, before anything of a request is read."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.settings import ServerSettings, is_loopback

OPEN = ("/", "/health")
"""Paths without a key: the page, which asks for the key itself, and whether the server lives."""
CONTAINER_NAMES = ("host.docker.internal", "host.containers.internal")
"""Names by which containers reach the loopback's services; nobody can register them."""


class Guard:
    """Checks requests against the settings of one server."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises ApiError, 401 or 403, for a request that is not to be served."""
        self._check_host(headers.get("host", ""))
        self._check_origin(headers)
        if self._keys and path not in OPEN and method != "OPTIONS":
            self._check_key(headers)

    def _check_host(self, host: str) -> None:
        """A page of another site whose name was made to point at this machine names that site in Host."""
        if not self._settings.is_loopback or self._keys:
            # Such a page has no key, and sees no more than a model's name.
            return
        name = _address(f"//{host}")[1]
        if name is None or not (is_loopback(name) or name in (self._settings.host.lower(), *CONTAINER_NAMES)):
            raise ApiError(403, f"the host {host[:100]!r} is not this server's: ask for localhost", code="wrong_host")

    def _check_origin(self, headers: Headers) -> None:
        """A browser says in Origin which site's page asks."""
        origin = headers.get("origin")
        if origin is None or "*" in self._settings.allow_origins or origin in self._settings.allow_origins:
            return
        if not origin or _address(origin)[0] != headers.get("host", "").lower():
            raise ApiError(
                403, f"pages of {origin[:100]!r} may not use this server: allow their origin", code="wrong_origin"
            )

    def _check_key(self, headers: Headers) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        keys = [key.strip().encode("utf-8", "replace") for key in sent]
        # All are compared, in constant time each: how long it takes says nothing of any key.
        if not sum(hmac.compare_digest(key, known) for key in keys for known in self._keys):
            what = "the API key is wrong" if any(keys) else "the API key is missing"
            raise ApiError(401, f"{what}: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'")


def _address(url: str) -> tuple[str, str | None]:
    """The host with its port in a URL, and the host alone; nothing where there is none, or a user's name before it."""
    try:
        parts = urlsplit(url)
        return ("", None) if "@" in parts.netloc else (parts.netloc.lower(), parts.hostname)
    except ValueError:
        return "", None
