"""/openapi.json: the OpenAPI document of the endpoints, made from the msgspec types of their bodies and answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from ziphius.errors import Unauthorized, ZiphiusError
from ziphius.frontend.endpoint import Endpoint
from ziphius.frontend.error_responses import JSON, ErrorBody

_OPENAPI_VERSION = "3.1.0"
_SECURITY_SCHEME = "bearer"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
"""A parameter in a path as Starlette writes it."""

_Json = dict[str, Any]


def openapi_document(endpoints: Sequence[Endpoint], version: str, has_key: bool) -> bytes:
    """JSON. `has_key`: the server has an API key, which all but the open endpoints need."""
    schemas = _Schemas(endpoints)
    paths: dict[str, _Json] = {}
    for endpoint in endpoints:
        item = paths.setdefault(_PARAMETER.sub(r"{\1}", endpoint.path), {})
        for method in endpoint.methods:
            item[method.lower()] = _operation(endpoint, method, schemas, has_key and not endpoint.open)
    document: _Json = {
        "openapi": _OPENAPI_VERSION,
        "info": {
            "title": "Ziphius",
            "version": version,
            "description": "OpenAI's API and SGLang's /generate, in front of one model.",
        },
        "paths": paths,
        "components": {"schemas": schemas.components},
    }
    if has_key:
        document["components"]["securitySchemes"] = {_SECURITY_SCHEME: {"type": "http", "scheme": "bearer"}}
    return msgspec.json.encode(document)


class _Schemas:
    """The JSON Schemas of all types in the document."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        types: list[Any] = [ErrorBody]
        for endpoint in endpoints:
            types += [reply.content for reply in endpoint.replies if reply.content is not None]
            if endpoint.body is not None:
                types.append(endpoint.body)
        schemas, self.components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
        self._pairs = list(zip(types, schemas, strict=True))

    def of(self, kind: Any) -> _Json:
        return next(schema for type_, schema in self._pairs if type_ == kind)


def _operation(endpoint: Endpoint, method: str, schemas: _Schemas, needs_key: bool) -> _Json:
    words = re.sub(r"\W+", "_", _PARAMETER.sub(r"\1", endpoint.path)).strip("_") or "root"
    operation: _Json = {
        "operationId": f"{method.lower()}_{words}",
        "summary": endpoint.summary,
        "responses": _responses(endpoint, schemas, needs_key),
    }
    names = _PARAMETER.findall(endpoint.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas.of(endpoint.body)}}}
    if needs_key:
        operation["security"] = [{_SECURITY_SCHEME: []}]
    return operation


def _responses(endpoint: Endpoint, schemas: _Schemas, needs_key: bool) -> _Json:
    errors: list[type[ZiphiusError]] = [*endpoint.errors, Unauthorized] if needs_key else [*endpoint.errors]
    responses = {
        str(status): _error_response([error for error in errors if error.http_status == status], schemas)
        for status in sorted({error.http_status for error in errors})
    }
    for reply in endpoint.replies:
        response = responses.setdefault(str(reply.status), {"description": reply.description})
        if reply.content is not None:
            response.setdefault("content", {})[reply.media_type] = {"schema": schemas.of(reply.content)}
    return dict(sorted(responses.items()))


def _error_response(errors: Sequence[type[ZiphiusError]], schemas: _Schemas) -> _Json:
    """The response for errors that all have the same status."""
    codes = ", ".join(sorted({f"`{error.openai_code or 'null'}`" for error in errors}))
    response: _Json = {
        "description": f"{HTTPStatus(errors[0].http_status).phrase}; `code` is one of {codes}",
        "content": {JSON: {"schema": schemas.of(ErrorBody)}},
    }
    headers = {}
    if any(error.retry_after_s is not None for error in errors):
        headers["Retry-After"] = {"description": "Seconds after which to ask again.", "schema": {"type": "integer"}}
    if Unauthorized in errors:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    return {**response, "headers": headers} if headers else response
