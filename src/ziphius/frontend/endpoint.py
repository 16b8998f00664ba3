"""Endpoint: one path of the API, who handles it, and what /openapi.json says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ziphius.errors import (
    BodyTooLarge,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    NotReady,
    Overloaded,
    ShuttingDown,
    UnsupportedField,
    ZiphiusError,
)
from ziphius.frontend.error_responses import JSON
from ziphius.frontend.protocol import Body
from ziphius.frontend.service import Service

EVENTS = "text/event-stream"
TEXT = "text/plain"

BODY_ERRORS = (InvalidRequest, UnsupportedField, BodyTooLarge)
"""What reading a body raises."""
MODEL_ERRORS = (NotReady, ShuttingDown, EngineFailed)
"""What an endpoint raises when it needs the model and there is none, or none any more."""
GENERATION_ERRORS = (*BODY_ERRORS, ContextLengthExceeded, *MODEL_ERRORS, Overloaded)
"""What an endpoint raises that generates an answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A response that is no error, or an error in a shape of its own."""

    status: int
    description: str
    content: Any = None
    """The type of its body, as msgspec takes types. None: it has no body."""
    media_type: str = JSON


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row of an API's table: the routes and the OpenAPI document are made of these rows."""

    path: str
    """As Starlette writes paths: `/v1/models/{model:path}`."""
    methods: tuple[str, ...]
    handle: Callable[[Service, Request], Awaitable[Response]]
    summary: str
    replies: tuple[Reply, ...]
    errors: tuple[type[ZiphiusError], ...] = ()
    """What `handle` raises; the application turns it into responses."""
    body: type[Body] | None = None
    open: bool = False
    """Answered without the API key: probes and monitors call it, it reveals no secret, and it costs little."""
