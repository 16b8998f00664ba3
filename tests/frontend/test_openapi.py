"""/openapi.json: valid by a library's word, complete, and true of what the server takes and answers."""

from __future__ import annotations

import copy

import jsonschema
import openapi_spec_validator
import pytest
from starlette.applications import Starlette

from ziphius.frontend.app import build_app

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 4}
TEXT = {"prompt": "hi", "temperature": 0, "max_tokens": 4}
GREEDY = {"temperature": 0, "max_new_tokens": 4}
KEY = {"authorization": "Bearer sk"}
OPEN = {"/health", "/health_generate", "/ready", "/ping", "/status", "/metrics"}


@pytest.fixture(scope="module")
def document(http):
    return http.get("/openapi.json").json()


def schema_of(document, content):
    """The schema of a JSON body, which allows no field that it does not name."""
    components = copy.deepcopy(document["components"])
    for schema in components["schemas"].values():
        schema.setdefault("additionalProperties", False)
    return jsonschema.Draft202012Validator({**content["application/json"]["schema"], "components": components})


def routes_of(service):
    app = build_app(service)
    while not isinstance(app, Starlette):
        app = getattr(app, "_app", None) or app.app
    return {(route.path.replace(":path", ""), method.lower()) for route in app.routes for method in route.methods}


def operations_of(document):
    return {(path, method): each for path, item in document["paths"].items() for method, each in item.items()}


def test_it_is_valid_with_and_without_a_key(document, start_server):
    openapi_spec_validator.validate(document)
    with start_server(api_key="sk").http(headers=KEY) as http:
        openapi_spec_validator.validate(http.get("/openapi.json").json())


def test_every_route_is_in_it_and_nothing_else(server, document):
    assert set(operations_of(document)) == routes_of(server.service)
    assert ("/v1/models/{model}", "get") in operations_of(document)


def test_every_operation_has_a_summary_and_a_name_of_its_own(document):
    operations = operations_of(document).values()
    assert all(operation["summary"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)


def test_security_is_told_where_the_server_asks_for_the_key(document, start_server):
    assert "securitySchemes" not in document["components"]
    with start_server(api_key="sk").http() as http:
        assert http.get("/openapi.json").status_code == 401
        operations = operations_of(http.get("/openapi.json", headers=KEY).json())
        for (path, method), operation in operations.items():
            asked = http.request(method, path.replace("{model}", "x")).status_code == 401
            assert (operation.get("security") == [{"bearer": []}]) == asked == (path not in OPEN)
            assert ("401" in operation["responses"]) == asked


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("post", "/v1/chat/completions", CHAT),
        ("post", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2, "stop": ["e"]}),
        ("post", "/v1/completions", TEXT),
        ("post", "/v1/completions", {**TEXT, "prompt": [[1, 2]], "logprobs": 2, "echo": True}),
        ("post", "/generate", {"text": "ab", "sampling_params": GREEDY}),
        ("put", "/generate", {"text": "ab", "sampling_params": {"stop": "e"}, "return_prompt_token_ids": True}),
        ("post", "/generate", {"text": ["ab", "c"], "sampling_params": {**GREEDY, "stop_token_ids": [104], "n": 2}}),
        ("post", "/generate", {"text": "ab", "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 0,
                               "top_logprobs_num": 2, "return_text_in_logprobs": True}),
        ("get", "/v1/models", None),
        ("get", "/v1/models/{model}", None),
        ("get", "/model_info", None),
        ("get", "/status", None),
        ("get", "/", None),
        ("get", "/openapi.json", None),
    ],
)  # fmt: skip
def test_answers_are_as_described(http, document, method, path, body):
    operation = document["paths"][path][method]
    if body is not None:
        schema_of(document, operation["requestBody"]["content"]).validate(body)
    response = http.request(method, path.replace("{model}", "fake-model"), json=body)
    assert response.status_code == 200, response.text
    schema_of(document, operation["responses"]["200"]["content"]).validate(response.json())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "nosuch": 1}),
        ("/v1/chat/completions", {**CHAT, "temperature": "hot"}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"content": "no role"}]}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "x": 1}]}]}),
        ("/v1/completions", {"max_tokens": 3}),
        ("/v1/completions", {**TEXT, "stop": [5]}),
        ("/generate", {"text": "a", "sampling_params": {"nosuch": 1}}),
        ("/generate", {"text": "a", "rid": 5}),
        ("/abort_request", {"nosuch": 1}),
    ],
)
def test_what_the_schemas_refuse_the_server_refuses_as_described(http, document, path, body):
    operation = document["paths"][path]["post"]
    assert not schema_of(document, operation["requestBody"]["content"]).is_valid(body)
    response = http.post(path, json=body)
    assert response.status_code == 400
    schema_of(document, operation["responses"]["400"]["content"]).validate(response.json())


def test_refusals_without_a_model_are_described(document, start_server):
    with start_server(ready=False).http() as http:
        for path, method in (("/v1/chat/completions", "post"), ("/generate", "post"), ("/health", "get")):
            body = {"/v1/chat/completions": CHAT, "/generate": {"text": "a"}}.get(path)
            response = http.request(method, path, json=body)
            described = document["paths"][path][method]["responses"]["503"]
            schema_of(document, described["content"]).validate(response.json())
            assert ("retry-after" in response.headers) == ("Retry-After" in described.get("headers", {}))


def test_fields_that_are_not_supported_say_so(document):
    chat = document["components"]["schemas"]["ChatBody"]["properties"]
    assert chat["tools"]["description"].startswith("Not supported")
    assert "description" not in chat["temperature"]
