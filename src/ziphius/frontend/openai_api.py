"""The OpenAI endpoints, from a body to a running generation; they form no answer and hold no state."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response

from ziphius.checkpoint.sampling_defaults import SamplingDefaults
from ziphius.errors import InvalidRequest, UnknownModel
from ziphius.frontend.error_responses import json_response
from ziphius.frontend.model import ServedModel
from ziphius.frontend.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from ziphius.frontend.openai_format import ChatFormat, CompletionFormat, FormatOptions
from ziphius.frontend.requests import numbered_rids, one_rid, read_json
from ziphius.frontend.sampling import CheckedSampling, SamplingRequest, check_token_ids, checked, in_range
from ziphius.frontend.service import Service
from ziphius.frontend.sse import GenerationResponse
from ziphius.frontend.stream import Generation, SequenceRequest
from ziphius.tokenizer.fim import fim_prompt

MAX_TOP_LOGPROBS = 20
"""OpenAI's own limit."""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "ziphius"
    root: str
    parent: None = None
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


def openai_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> Response:
        return json_response(ModelList(data=[_card(service.described_model())]))

    @router.get("/v1/models/{model:path}")
    async def one_model(model: str) -> Response:
        served = service.described_model()
        if model != served.info.name:
            raise UnknownModel(f"The model '{model[:200]}' does not exist", param="model")
        return json_response(_card(served))

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_json(request, ChatBody, service.config.max_body_bytes)
        return await _chat(service, body)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_json(request, CompletionBody, service.config.max_body_bytes)
        return await _completion(service, body)

    return router


async def _chat(service: Service, body: ChatBody) -> Response:
    model = service.require_model()
    model.check_name(body.model)
    sampling = checked(chat_sampling(body, model.info.sampling), model.tokenizer, model.limits)
    rid = one_rid(body.rid)
    service.client.check_room(sampling.copies)
    prompt = await model.encode_chat(body.messages, bool(body.continue_final_message))
    generation = _submit(service, model, sampling, [prompt], rid, bool(body.stream))
    options = _format_options(body, model, rid, sampling, ())
    return GenerationResponse(generation, ChatFormat(options, model.tokenizer), service.write_timeout_s)


async def _completion(service: Service, body: CompletionBody) -> Response:
    model = service.require_model()
    model.check_name(body.model)
    sampling = checked(completion_sampling(body, model.info.sampling), model.tokenizer, model.limits)
    rid = one_rid(body.rid)
    whole = isinstance(body.prompt, str) or (bool(body.prompt) and isinstance(body.prompt[0], int))
    service.client.check_room(sampling.copies * (1 if whole else len(body.prompt)))
    texts, prompts = await _prompts(model, body)
    generation = _submit(service, model, sampling, prompts, rid, bool(body.stream))
    options = _format_options(body, model, rid, sampling, texts if body.echo else ())
    return GenerationResponse(generation, CompletionFormat(options, model.tokenizer), service.write_timeout_s)


async def _prompts(model: ServedModel, body: CompletionBody) -> tuple[tuple[str, ...], list[list[int]]]:
    """The prompts as text (only where they must be echoed) and as ids."""
    prompt = body.prompt
    if not prompt and not (prompt == "" and body.suffix):  # an editor's cursor may stand before all text
        raise InvalidRequest("Prompt cannot be empty", param="prompt")
    if body.suffix and not isinstance(prompt, str):
        raise InvalidRequest("suffix needs a prompt that is one text", param="suffix")
    if isinstance(prompt, str):
        whole = fim_prompt(model.tokenizer, prompt, body.suffix) if body.suffix else prompt
        return (prompt,), [await model.encode(whole, "prompt")]
    texts = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        return tuple(texts), [await model.encode(text, "prompt") for text in texts]
    single = [item for item in prompt if isinstance(item, int)]
    several = [item for item in prompt if isinstance(item, list)]
    if len(single) != len(prompt) and len(several) != len(prompt):
        raise InvalidRequest("prompt must hold only strings, only token ids or only lists of token ids", param="prompt")
    batch = [single] if single else several
    for ids in batch:
        if not ids:
            raise InvalidRequest("Prompt cannot be empty", param="prompt")
        check_token_ids(ids, "prompt", model.limits.vocab_size)
    echoed = tuple(model.tokenizer.decode(ids) for ids in batch) if body.echo else ()
    return echoed, batch


def chat_sampling(body: ChatBody, defaults: SamplingDefaults) -> SamplingRequest:
    logprobs = bool(body.logprobs)
    if body.top_logprobs and not logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return SamplingRequest(
        fields=body,
        max_new_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        default_new_tokens=None,
        min_new_tokens=body.min_tokens or 0,
        seed=body.seed,
        logprobs=logprobs,
        top_logprobs=in_range("top_logprobs", body.top_logprobs or 0, 0, MAX_TOP_LOGPROBS),
        defaults=defaults,
        names={"max_new_tokens": limit_name, "min_new_tokens": "min_tokens"},
    )


def completion_sampling(body: CompletionBody, defaults: SamplingDefaults) -> SamplingRequest:
    logprobs = body.logprobs is not None
    return SamplingRequest(
        fields=body,
        max_new_tokens=body.max_tokens,
        default_new_tokens=16,
        min_new_tokens=body.min_tokens or 0,
        seed=body.seed,
        logprobs=logprobs,
        top_logprobs=in_range("logprobs", body.logprobs or 0, 0, MAX_TOP_LOGPROBS),
        prompt_logprobs_from=0 if logprobs and body.echo else -1,
        defaults=defaults,
        names={"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"},
    )


def _submit(service: Service, model: ServedModel, sampling: CheckedSampling, prompts: Sequence[list[int]], rid: str,
            streaming: bool) -> Generation:  # fmt: skip
    rids = iter(numbered_rids(rid, len(prompts) * sampling.copies))
    requests = [
        SequenceRequest(
            public_rid=next(rids),
            group_rid=rid,
            prompt_ids=prompt,
            sampling=sampling.params_for(len(prompt), copy, model.limits),
            text=sampling.text,
            wants_no_tokens=sampling.wants_no_tokens,
        )
        for prompt in prompts
        for copy in range(sampling.copies)
    ]
    return service.client.submit(requests, model.tokenizer, streaming)


def _format_options(body: OpenAIBody, model: ServedModel, rid: str, sampling: CheckedSampling,
                    echo: tuple[str, ...]) -> FormatOptions:  # fmt: skip
    options = body.stream_options
    return FormatOptions(
        rid=rid,
        created=int(time.time()),
        model=model.info.name,
        copies=sampling.copies,
        logprobs=sampling.request.logprobs,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        echo=echo,
    )


def _card(model: ServedModel) -> ModelCard:
    info = model.info
    return ModelCard(
        id=info.name, created=info.created, root=info.name, max_model_len=model.limits.context_length or None
    )  # fmt: skip
