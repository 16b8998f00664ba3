"""The ASGI application: all APIs' endpoints, with the key, CORS, counting and the shape of errors around them."""

from __future__ import annotations

import functools
import hmac
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ziphius.errors import EngineFailed, InvalidRequest, NotFound, Unauthorized, ZiphiusError
from ziphius.frontend import admin_api, openai_api, sglang_api
from ziphius.frontend.endpoint import Endpoint, Reply
from ziphius.frontend.error_responses import JSON, error_response
from ziphius.frontend.metrics import Metrics
from ziphius.frontend.openapi import openapi_document
from ziphius.frontend.service import Service


async def _openapi(service: Service, request: Request) -> Response:
    has_key = service.config.api_key is not None
    return Response(openapi_document(ENDPOINTS, service.version, has_key), media_type=JSON)


ENDPOINTS = (
    *openai_api.ENDPOINTS,
    *sglang_api.ENDPOINTS,
    *admin_api.ENDPOINTS,
    Endpoint(
        "/openapi.json", ("GET",), _openapi, "This document", replies=(Reply(200, "the document", dict[str, Any]),)
    ),
)  # fmt: skip


def build_app(service: Service) -> ASGIApp:
    """The application for one service."""
    app = Starlette(
        routes=[_EndpointRoute(endpoint, service) for endpoint in ENDPOINTS],
        exception_handlers={
            ZiphiusError: _on_ziphius_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
    guarded: ASGIApp = app if service.config.api_key is None else KeyMiddleware(app, service.config.api_key)
    # Any origin, but never with credentials: a page can send the key only if somebody gave it the key
    crossing = CORSMiddleware(guarded, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    return CountingMiddleware(crossing, service.metrics)


class _EndpointRoute(Route):
    """The route of one endpoint. It puts itself into the scope, also for a wrong method, for CountingMiddleware."""

    def __init__(self, endpoint: Endpoint, service: Service) -> None:
        super().__init__(endpoint.path, functools.partial(endpoint.handle, service), methods=endpoint.methods)
        self.methods = set(endpoint.methods)  # Starlette adds HEAD wherever there is GET

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, child_scope if match is Match.NONE else {**child_scope, "route": self}


class KeyMiddleware:
    """401 without the bearer key, before any body is read."""

    _OPEN_PATHS = frozenset(endpoint.path for endpoint in ENDPOINTS if endpoint.open)

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._OPEN_PATHS and scope["method"] != "OPTIONS":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._expected):
                what = "You must send the API key as 'Authorization: Bearer KEY'." if not given else "Wrong API key."
                await error_response(Unauthorized(what))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class CountingMiddleware:
    """Counts requests and responses by route. A caller cannot invent labels: an unknown path counts as `other`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, method = self._metrics, scope["method"]
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.http_active += 1
        try:
            await self._app(scope, receive, send_counted)
        finally:
            metrics.http_active -= 1
            endpoint = getattr(scope.get("route"), "path", "other")
            metrics.http_requests[endpoint, method] += 1
            metrics.http_responses[endpoint, method, str(status or 499)] += 1


async def _on_ziphius_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ZiphiusError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in the shape of all other errors."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(NotFound(f"there is no {request.method} {request.url.path[:200]}"))
    response = error_response(InvalidRequest(error.detail))
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """The client left while it sent its body: nobody reads this answer."""
    return Response(status_code=400)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The traceback goes to the log; Starlette raises the error again after this answer."""
    return error_response(EngineFailed("internal error; the server's log tells more"))
