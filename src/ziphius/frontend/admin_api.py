"""Endpoints about the server itself: health, status, metrics, model info, aborts, prefix cache."""

from __future__ import annotations

import asyncio
import time

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ziphius.errors import NotReady, ZiphiusError
from ziphius.frontend.endpoint import BODY_ERRORS, MODEL_ERRORS, TEXT, Endpoint, Reply
from ziphius.frontend.engine_client import new_rid
from ziphius.frontend.error_responses import json_response
from ziphius.frontend.generate import GenerateRequest, TokenPrompt, generate
from ziphius.frontend.metrics import Exposition
from ziphius.frontend.protocol import SamplingFields
from ziphius.frontend.requests import read_json
from ziphius.frontend.sampling import SamplingRequest, checked
from ziphius.frontend.service import Service, Status
from ziphius.frontend.sglang_bodies import AbortBody
from ziphius.ipc.messages import LoadProgress

_PROBE_TIMEOUT_S = 20.0


class Unhealthy(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /health when its status is 503."""

    status: str
    phase: str
    progress: LoadProgress
    message: str


class ModelInfoBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /get_model_info, with SGLang's names."""

    model_path: str
    served_model_name: str
    tokenizer_path: str
    is_generation: bool = True
    preferred_sampling_params: None = None
    weight_version: str = "default"
    load_format: str = "auto"
    reasoning_parser: None = None
    tool_call_parser: None = None
    disaggregation_mode: str = "null"
    has_image_understanding: bool = False
    has_audio_understanding: bool = False
    model_type: str
    architectures: list[str]
    context_length: int | None
    vocab_size: int


async def _abort_request(service: Service, request: Request) -> Response:
    body = await read_json(request, AbortBody, service.config.max_body_bytes)
    if body.abort_all:
        service.client.abort_all("Aborted")
    elif body.rid is not None:
        service.client.abort(body.rid)
    return Response()


async def _flush_cache(service: Service, request: Request) -> Response:
    service.require_model()
    result = await service.client.flush_cache()
    if not result.flushed:
        return PlainTextResponse(f"Flush cache failed. {result.reason or ''}".strip() + "\n", 400)
    return PlainTextResponse("Cache flushed.\n")


async def _health(service: Service, request: Request) -> Response:
    return Response() if service.healthy else _unhealthy(service)


async def _health_generate(service: Service, request: Request) -> Response:
    """Healthy if a token can be generated now. A server that is generating for a request needs no test."""
    if not service.healthy:
        return _unhealthy(service)
    if service.client.heard_recently:
        return Response()
    try:
        await asyncio.wait_for(_probe(service), _PROBE_TIMEOUT_S)
    except (ZiphiusError, TimeoutError) as e:
        return _unhealthy(service, str(e) or f"no token within {_PROBE_TIMEOUT_S:g} s")
    return Response()


async def _root(service: Service, request: Request) -> Response:
    return json_response("Ziphius is running")


async def _status(service: Service, request: Request) -> Response:
    return json_response(service.status())


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.exposition.render(), headers={"content-type": Exposition.CONTENT_TYPE})


async def _model_info(service: Service, request: Request) -> Response:
    model = service.described_model()
    info = model.info
    return json_response(
        ModelInfoBody(
            model_path=info.path,
            served_model_name=info.name,
            tokenizer_path=info.path,
            model_type=info.model_type,
            architectures=[info.architecture],
            context_length=model.limits.context_length or None,
            vocab_size=info.vocab_size,
        )
    )


async def _probe(service: Service) -> None:
    """Generate one token, through everything a request goes through."""
    model = service.require_model()
    fields = SamplingFields(temperature=0.0, ignore_eos=True)
    asked = SamplingRequest(fields, max_new_tokens=1, default_new_tokens=None, seed=int(time.time()))
    rid = f"health-{new_rid()}"
    sampling = checked(asked, model.tokenizer, model.limits)
    request = GenerateRequest(TokenPrompt([0]), [sampling], [rid], group_rid=rid, streaming=False)
    generation = await generate(service.client, model, request)
    try:
        await generation.news()
    finally:
        generation.close()
    if generation.failure is not None:
        raise generation.failure
    if generation.streams[0].completion_tokens == 0:
        raise NotReady("the engine generated nothing")


def _unhealthy(service: Service, message: str | None = None) -> Response:
    body = Unhealthy(
        status=service.state,
        phase=service.progress.phase if service.state == "loading" else service.state,
        progress=service.progress,
        message=message or service.unhealthy_reason(),
    )
    return json_response(body, 503)


_HEALTH = (Reply(200, "healthy"), Reply(503, "not healthy, and why", Unhealthy))
ENDPOINTS = (
    *(
        Endpoint(path, ("GET", "HEAD"), _health, "Whether a request would be answered now", _HEALTH, open=True)
        for path in ("/health", "/ready", "/ping")
    ),
    Endpoint(
        "/health_generate", ("GET",), _health_generate, "Whether a token can be generated now", _HEALTH, open=True
    ),
    Endpoint(
        "/status", ("GET",), _status, "State, loading progress, requests, speed, KV cache",
        replies=(Reply(200, "the status", Status),), open=True,
    ),
    Endpoint(
        "/metrics", ("GET",), _metrics, "Metrics in Prometheus' format",
        replies=(Reply(200, "the metrics", str, TEXT),), open=True,
    ),
    Endpoint("/", ("GET",), _root, "A greeting", replies=(Reply(200, "the greeting", str),)),
    *(
        Endpoint(
            path, ("GET",), _model_info, "What the served model is",
            replies=(Reply(200, "the model", ModelInfoBody),), errors=MODEL_ERRORS,
        )
        for path in ("/get_model_info", "/model_info")
    ),
    Endpoint(
        "/abort_request", ("POST",), _abort_request, "End a request, a batch or all requests",
        body=AbortBody, replies=(Reply(200, "done, also when there is no such request"),), errors=BODY_ERRORS,
    ),
    Endpoint(
        "/flush_cache", ("GET", "POST"), _flush_cache, "Empty the prefix cache",
        replies=(Reply(200, "it is empty", str, TEXT), Reply(400, "it is not: requests are running", str, TEXT)),
        errors=MODEL_ERRORS,
    ),
)  # fmt: skip
