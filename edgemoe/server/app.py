"""The server as an ASGI application."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgemoe.model_host import ModelHost
from edgemoe.server.endpoints import Endpoints
from edgemoe.server.guard import Guard
from edgemoe.server.protocols.errors import ApiError, api_error
from edgemoe.server.protocols.reply import ServedModel
from edgemoe.server.replying import Replier
from edgemoe.server.settings import ServerSettings
from edgemoe.server.turns import Turns

LOG = logging.getLogger("edgemoe.server")


class App:
    """Checks who asks, answers, and turns errors into the words of the protocol."""

    def __init__(self, host: ModelHost, name: str, settings: ServerSettings) -> None:
        """Serves the model of `host`, which requests call `name`. The caller closes `host`."""
        self.replier = Replier(host, Turns(settings.max_running, settings.max_queue), settings)
        self.statuses: Counter[int] = Counter()
        """Answers by their HTTP status."""
        served = ServedModel(name, int(time.time()), settings.aliases)
        routes = Endpoints(self.replier, served, self.statuses).routes()
        self._router = Router(routes, default=_unknown, redirect_slashes=False)
        self._guard = Guard(settings)
        self._served: ASGIApp = self._serve
        if settings.allow_origins:
            self._served = CORSMiddleware(
                self._serve, settings.allow_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            await self._served(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        failure: Exception | None = None

        async def counting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.statuses[message["status"]] += 1
                # OpenAI's clients read the first, Anthropic's the second.
                number = f"req_{uuid.uuid4().hex}".encode()
                named = [(b"x-request-id", number), (b"request-id", number)]
                message = {**message, "headers": [*message.get("headers", ()), *named]}
            await send(message)

        try:
            self._guard.check(scope["method"], scope["path"], Headers(scope=scope))
            await self._router({**scope, "app": self}, receive, counting)
        except ClientDisconnect:
            return
        except HTTPException as error:
            says = f"{scope['method']} is not served here: {error.detail}"
            failure = ApiError(error.status_code, says, headers=error.headers)
        except Exception as error:
            failure = error
        if failure is None:
            return
        told = api_error(failure)
        if told.status == 500:
            LOG.error("a request failed", exc_info=failure)
        if not begun:
            await _tell(scope, told, receive, counting)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, f"{scope['method']} {scope['path'][:200]} is not served", code="unknown_url")


async def _tell(scope: Scope, error: ApiError, receive: Receive, send: Send) -> None:
    """Answers with an error in the protocol of the path."""
    shape = error.anthropic() if scope["path"].startswith("/v1/messages") else error.openai()
    # What of the body was not read is in the way of a next request.
    headers = error.headers | ({"connection": "close"} if error.status in (408, 413) else {})
    await JSONResponse(shape, error.status, headers)(scope, receive, send)
