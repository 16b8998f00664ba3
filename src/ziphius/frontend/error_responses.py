"""The one mapping from the error tree to HTTP responses and SSE events; and JSON responses."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from starlette.responses import Response

from ziphius.errors import ZiphiusError

JSON = "application/json"
SSE_DONE = b"data: [DONE]\n\n"


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's error object. Its clients read these four fields."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


def error_body(error: ZiphiusError) -> bytes:
    return msgspec.json.encode(
        ErrorBody(ErrorDetail(error.message, error.openai_type, error.param, error.openai_code))
    )  # fmt: skip


def error_response(error: ZiphiusError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.http_status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        # The rest of the body may still be on its way, and nobody will read it
        headers["Connection"] = "close"
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(error_body(error), status_code=error.http_status, headers=headers, media_type=JSON)


def error_event(error: ZiphiusError) -> bytes:
    """The last event of a stream that failed after it had begun. No [DONE] follows it."""
    return b"data: " + error_body(error) + b"\n\n"


def json_response(content: object, status: int = 200) -> Response:
    """`content`: anything that msgspec can encode."""
    return Response(msgspec.json.encode(content), status_code=status, media_type=JSON)
