"""What is wrong with a request, as an HTTP status and in the words of each protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.errors import CheckpointError, EdgeMoEError, PlanError, RequestError
from edgemoe.server.protocols.fields import FieldError

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    **_OPENAI_TYPES, 413: "request_too_large", 500: "api_error", 503: "overloaded_error", 504: "timeout_error"
}  # fmt: skip
_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
_TOO_LONG = "and the context"
"""In the message of a prompt that does not fit the context."""


class ApiError(EdgeMoEError):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`status` is HTTP's, `param` the field that is wrong, `code` a word for programs, `retry_after` seconds.

        `headers` are more headers of the answer.
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code if code is not None else _CODES.get(status)
        self.retry_after = retry_after
        self._headers = dict(headers or {})

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after else {}
        return self._headers | headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def openai(self) -> dict[str, Any]:
        """The error object of OpenAI's protocol."""
        kind = _OPENAI_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The error object of Anthropic's protocol."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(self)}}


def api_error(error: BaseException, body: Mapping[str, Any] | None = None) -> ApiError:
    """`error` as an answer to the request with `body`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (FieldError, RequestError)):
        code = "context_length_exceeded" if _TOO_LONG in str(error) else None
        return ApiError(400, str(error), param=_param(str(error), body or {}), code=code)
    if isinstance(error, (CheckpointError, PlanError)):
        return ApiError(503, f"the model is not available: {error}", code="model_not_available")
    if isinstance(error, EdgeMoEError):
        return ApiError(503, str(error), code="engine_error", retry_after=1)
    return ApiError(500, f"the server failed with {type(error).__name__}: try again", code="internal_error")


def _param(message: str, body: Mapping[str, Any]) -> str | None:
    """The field that a message speaks of: messages begin with the field's name."""
    first = message.partition(" ")[0]
    return first if first in body else None
