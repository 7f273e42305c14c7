"""What each path of the server answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edgemoe.engine import Engine
from edgemoe.server import metrics
from edgemoe.server.deadline import within
from edgemoe.server.page import page
from edgemoe.server.protocols import fields
from edgemoe.server.protocols.anthropic_input import chat_body
from edgemoe.server.protocols.anthropic_messages import MessageReply
from edgemoe.server.protocols.chat_prompt import chat_prompt
from edgemoe.server.protocols.errors import ApiError, api_error
from edgemoe.server.protocols.json_body import read_json_object
from edgemoe.server.protocols.openai_chat import ChatReply
from edgemoe.server.protocols.openai_completions import CompletionReply
from edgemoe.server.protocols.openai_responses import ResponseReply
from edgemoe.server.protocols.reply import Reply, ServedModel
from edgemoe.server.replying import Replier, ReplyResponse, leased

DISCARDED_NBYTES = 64 << 20
DISCARD_SECONDS = 1.0
"""How much of a body that is refused is read, and for how long."""
Endpoint = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """The endpoints of one server."""

    def __init__(self, replier: Replier, served: ServedModel, statuses: Mapping[int, int]) -> None:
        """`statuses` counts the answers so far by their HTTP status."""
        self._replier = replier
        self._host = replier.host
        self._served = served
        self._statuses = statuses

    def routes(self) -> list[Route]:
        """All of them."""
        post = {
            "/v1/chat/completions": self._replies(ChatReply),
            "/v1/completions": self._replies(CompletionReply),
            "/v1/responses": self._replies(ResponseReply),
            "/v1/messages": self._replies(MessageReply),
            "/v1/messages/count_tokens": self._count_tokens,
            "/tokenize": self._tokenize,
            "/load": self._load,
            "/unload": self._unload,
        }
        get = {
            "/": self._page,
            "/health": self._health,
            "/metrics": self._metrics,
            "/stats": self._stats,
            "/plan": self._plan,
            "/v1/models": self._models,
            "/v1/models/": self._models,
            "/v1/models/{id:path}": self._model,
            "/v1/responses/{id}": self._stored,
        }
        return [
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
        ]

    def _replies(self, kind: Callable[[Mapping[str, Any], ServedModel], Reply]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            body = await self._body(request)
            try:
                return ReplyResponse(self._replier, kind(body, self._served), body)
            except Exception as error:
                raise api_error(error, body) from error

        return endpoint

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request. Raises ApiError where it is too large, too slow, or none."""
        settings = self._replier.settings
        too_large = ApiError(413, f"the body has more than {settings.max_body} bytes: send less")
        length = request.headers.get("content-length", "0")
        parts, size = [], 0
        stream = request.stream()
        if not length.isdecimal() or int(length) > settings.max_body:
            await _discard(stream)
            raise too_large
        try:
            while part := await within(settings.stall_timeout, anext(stream, b"")):
                size += len(part)
                if size > settings.max_body:
                    await _discard(stream)
                    raise too_large
                parts.append(part)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not come in time: send it at once") from None
        return read_json_object(b"".join(parts))

    # --- the model -------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        names = self._served.names
        ids = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return JSONResponse({"object": "list", "data": [self._described(name) for name in names], **ids})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._served.asked(request.path_params["id"]).name))

    def _described(self, name: str) -> dict[str, Any]:
        """The model by one of its names, in OpenAI's shape and in Anthropic's; fields of both have the same value."""
        created = datetime.fromtimestamp(self._served.created, timezone.utc)
        engine = self._host.engine
        return {
            "id": name,
            "object": "model",
            "created": self._served.created,
            "owned_by": "edgemoe",
            "type": "model",
            "display_name": name,
            "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "lifecycle": "active",
            "max_input_tokens": engine.plan.context if engine is not None else None,
        }

    async def _load(self, request: Request) -> Response:
        loading = self._host.load()
        return JSONResponse(self._state(), 200 if loading.done() else 202)

    async def _unload(self, request: Request) -> Response:
        unloaded = await asyncio.to_thread(self._host.unload)
        return JSONResponse(self._state(), 200 if unloaded else 202)

    async def _plan(self, request: Request) -> Response:
        # No thread waits for a loading, which the end of the server would then wait for.
        plan = await asyncio.wrap_future(self._host.begin_plan())
        rows = [{"what": what, "how_much": much, "where": where} for what, much, where in plan.lines()]
        return JSONResponse(plan.to_dict() | {"rows": rows})

    # --- figures ---------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        host, progress, error = self._host, self._host.progress, self._host.error
        return {
            "model": self._served.name,
            "state": host.state,
            "progress": None if progress is None else vars(progress),
            "error": None if error is None else str(error),
        }

    async def _health(self, request: Request) -> Response:
        """Ready, or unloaded until it is asked for, is healthy."""
        state = self._state()
        sick = "ending" if self._replier.ending else "error" if state["error"] else ""
        status = sick or ("loading" if state["state"] == "loading" else "ok")
        return JSONResponse({"status": status, **state}, 200 if status == "ok" else 503)

    async def _stats(self, request: Request) -> Response:
        engine, turns = self._host.engine, self._replier.turns
        queue = {"running": turns.running, "waiting": turns.waiting, "requests": turns.requests}
        return JSONResponse(self._state() | {"queue": queue, "stats": _totals(engine)})

    async def _metrics(self, request: Request) -> Response:
        turns, engine = self._replier.turns, self._host.engine
        found = [
            metrics.gauge("model_loaded", "Whether the model is in memory.", int(engine is not None)),
            metrics.gauge("replies_running", "Replies that the engine works at.", turns.running),
            metrics.gauge("replies_waiting", "Replies that wait for their turn.", turns.waiting),
            metrics.gauge("requests_open", "Requests that are answered or wait.", turns.requests),
            metrics.responses(self._statuses),
        ]
        if engine is not None:
            found += metrics.engine_metrics(engine.stats, engine.plan)
        return PlainTextResponse(metrics.exposition(found), headers={"content-type": metrics.CONTENT_TYPE})

    # --- tokens ----------------------------------------------------------------------------------

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        prompt = chat_prompt(body) if "messages" in body else fields.words("content", body.get("content"))
        async with leased(self._host) as engine:
            tokens = await asyncio.to_thread(engine.tokenize, prompt)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def _count_tokens(self, request: Request) -> Response:
        body = await self._body(request)
        self._served.asked(body.get("model"))
        prompt = chat_prompt(chat_body(body, counts=True))
        async with leased(self._host) as engine:
            tokens = await asyncio.to_thread(engine.count_tokens, prompt)
        return JSONResponse({"input_tokens": tokens})

    async def _stored(self, request: Request) -> Response:
        raise ApiError(404, "responses are not stored: keep their items, and send them as input")

    async def _page(self, request: Request) -> Response:
        text, headers = page()
        return HTMLResponse(text, headers=headers)


def _totals(engine: Engine | None) -> dict[str, Any] | None:
    return None if engine is None else engine.stats.to_dict()


async def _discard(body: AsyncIterator[bytes]) -> None:
    """Reads the rest of a body that is refused, as far as the bounds allow.

    A connection that is closed while the client still sends is reset, and the answer is lost with it.
    """

    async def read() -> None:
        size = 0
        async for part in body:
            size += len(part)
            if size > DISCARDED_NBYTES:
                return

    with suppress(asyncio.TimeoutError):
        await within(DISCARD_SECONDS, read())
