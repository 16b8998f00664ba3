"""The ASGI application: routes put together, with key, CORS, counting and error shapes around; it makes no route."""

from __future__ import annotations

import hmac
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ziphius.errors import EngineFailed, InvalidRequest, NotFound, Unauthorized, ZiphiusError
from ziphius.frontend.admin_api import admin_router
from ziphius.frontend.error_responses import error_response
from ziphius.frontend.metrics import Metrics
from ziphius.frontend.openai_api import openai_router
from ziphius.frontend.service import Service
from ziphius.frontend.sglang_api import sglang_router

OPEN_PATHS = frozenset({"/health", "/health_generate", "/ready", "/ping", "/status", "/metrics"})
"""What probes and monitors ask without the key; none of them tells or costs anything of worth."""


def build_app(service: Service) -> ASGIApp:
    """The application for one service; build as many as you like."""
    app = FastAPI(title="Ziphius", version=service.version, openapi_url=None)
    app.include_router(openai_router(service))
    app.include_router(sglang_router(service))
    app.include_router(admin_router(service))
    app.add_exception_handler(ZiphiusError, _on_ziphius_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
    guarded: ASGIApp = app if service.config.api_key is None else KeyMiddleware(app, service.config.api_key)
    # Any origin, never with credentials: a page can send the bearer key only if somebody gave it to it
    crossing = CORSMiddleware(guarded, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    return CountingMiddleware(crossing, service.metrics)


class KeyMiddleware:
    """401 without the bearer key, before any body is read."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._expected):
                what = "You must send the API key as 'Authorization: Bearer KEY'." if not given else "Wrong API key."
                await error_response(Unauthorized(what))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class CountingMiddleware:
    """Counts requests and responses by route, so that a caller cannot make labels up."""

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
    """The client went while it sent its body: nobody reads this."""
    return Response(status_code=400)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The traceback goes to the log; Starlette raises the error again after this answer."""
    return error_response(EngineFailed("internal error; the server's log tells more"))
