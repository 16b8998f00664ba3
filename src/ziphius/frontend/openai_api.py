"""OpenAI's endpoints: from a body to a running generation and its format."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ziphius.checkpoint.sampling_defaults import SamplingDefaults
from ziphius.errors import InvalidRequest, UnknownModel
from ziphius.frontend.endpoint import EVENTS, GENERATION_ERRORS, MODEL_ERRORS, Endpoint, Reply
from ziphius.frontend.error_responses import json_response
from ziphius.frontend.generate import ChatPrompt, GenerateRequest, Prompts, generate
from ziphius.frontend.model import ServedModel
from ziphius.frontend.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from ziphius.frontend.openai_format import ChatAnswer, ChatFormat, CompletionAnswer, CompletionFormat, FormatOptions
from ziphius.frontend.requests import numbered_rids, one_rid, read_json
from ziphius.frontend.sampling import CheckedSampling, SamplingRequest, check_token_ids, checked, in_range
from ziphius.frontend.service import Service
from ziphius.frontend.sse import GenerationResponse
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


async def _list_models(service: Service, request: Request) -> Response:
    return json_response(ModelList(data=[_card(service.described_model())]))


async def _one_model(service: Service, request: Request) -> Response:
    name = request.path_params["model"]
    served = service.described_model()
    if name != served.info.name:
        raise UnknownModel(f"The model '{name[:200]}' does not exist", param="model")
    return json_response(_card(served))


async def _chat(service: Service, request: Request) -> Response:
    body = await read_json(request, ChatBody, service.config.max_body_bytes)
    model = service.require_model()
    model.check_name(body.model)
    sampling = checked(chat_sampling(body, model.info.sampling), model.tokenizer, model.limits)
    prompts = ChatPrompt(body.messages, bool(body.continue_final_message))
    rid = one_rid(body.rid)
    generation = await generate(service.client, model, _request(body, prompts, sampling, rid))
    form = ChatFormat(_format_options(body, model, rid, sampling, ()), model.tokenizer)
    return GenerationResponse(generation, form, service.write_timeout_s)


async def _completion(service: Service, request: Request) -> Response:
    body = await read_json(request, CompletionBody, service.config.max_body_bytes)
    model = service.require_model()
    model.check_name(body.model)
    sampling = checked(completion_sampling(body, model.info.sampling), model.tokenizer, model.limits)
    rid = one_rid(body.rid)
    prompts = _CompletionPrompts(body)
    generation = await generate(service.client, model, _request(body, prompts, sampling, rid))
    echo = prompts.texts(model) if body.echo else ()
    form = CompletionFormat(_format_options(body, model, rid, sampling, echo), model.tokenizer)
    return GenerationResponse(generation, form, service.write_timeout_s)


def _request(body: OpenAIBody, prompts: Prompts, sampling: CheckedSampling, rid: str) -> GenerateRequest:
    return GenerateRequest(
        prompts=prompts,
        sampling=[sampling] * prompts.count,
        rids=numbered_rids(rid, prompts.count * sampling.copies),
        group_rid=rid,
        streaming=bool(body.stream),
    )


class _CompletionPrompts:
    """`prompt` of a completion: a text, token ids, or a list of either."""

    def __init__(self, body: CompletionBody) -> None:
        """InvalidRequest when there is no prompt, or none that `suffix` can go with."""
        prompt, suffix = body.prompt, body.suffix
        if not prompt and not (prompt == "" and suffix):  # an editor's cursor may stand before all text
            raise InvalidRequest("Prompt cannot be empty", param="prompt")
        if suffix and not isinstance(prompt, str):
            raise InvalidRequest("suffix needs a prompt that is one text", param="suffix")
        self._suffix = suffix
        self._prompt = prompt
        self.count = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)

    async def encode(self, model: ServedModel) -> list[list[int]]:
        prompt = self._prompt
        if isinstance(prompt, str):
            whole = fim_prompt(model.tokenizer, prompt, self._suffix) if self._suffix else prompt
            return [await model.encode(whole, "prompt")]
        texts = [item for item in prompt if isinstance(item, str)]
        if len(texts) == len(prompt):
            return [await model.encode(text, "prompt") for text in texts]
        batch = self._ids()
        for ids in batch:
            if not ids:
                raise InvalidRequest("Prompt cannot be empty", param="prompt")
            check_token_ids(ids, "prompt", model.limits.vocab_size)
        return batch

    def texts(self, model: ServedModel) -> tuple[str, ...]:
        """The prompts as text. Call `encode` first: it refuses ids that have none."""
        if isinstance(self._prompt, str):
            return (self._prompt,)
        texts = [item for item in self._prompt if isinstance(item, str)]
        return tuple(texts) or tuple(model.tokenizer.decode(ids) for ids in self._ids())

    def _ids(self) -> list[list[int]]:
        """The prompts that are token ids. InvalidRequest when they are mixed with others."""
        single = [item for item in self._prompt if isinstance(item, int)]
        several = [item for item in self._prompt if isinstance(item, list)]
        if len(single) != len(self._prompt) and len(several) != len(self._prompt):
            raise InvalidRequest(
                "prompt must hold only strings, only token ids or only lists of token ids", param="prompt"
            )
        return [single] if single else several


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


_EVENTS = Reply(200, "the answer, with `stream` as events: `data:` and a JSON chunk, at last `[DONE]`", str, EVENTS)
ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions", ("POST",), _chat, "The next message of a conversation",
        body=ChatBody,
        replies=(Reply(200, "the answer, with `stream` as events", ChatAnswer), _EVENTS),
        errors=(*GENERATION_ERRORS, UnknownModel),
    ),
    Endpoint(
        "/v1/completions", ("POST",), _completion, "The continuation of one or several prompts",
        body=CompletionBody,
        replies=(Reply(200, "the answer, with `stream` as events", CompletionAnswer), _EVENTS),
        errors=(*GENERATION_ERRORS, UnknownModel),
    ),
    Endpoint(
        "/v1/models", ("GET",), _list_models, "The model that is served",
        replies=(Reply(200, "a list of one model", ModelList),),
        errors=MODEL_ERRORS,
    ),
    Endpoint(
        "/v1/models/{model:path}", ("GET",), _one_model, "The model that is served, by its name",
        replies=(Reply(200, "the model", ModelCard),),
        errors=(*MODEL_ERRORS, UnknownModel),
    ),
)  # fmt: skip
