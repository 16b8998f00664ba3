"""SGLang's /generate: from a body to a running generation and its format."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ziphius.errors import InvalidRequest
from ziphius.frontend.endpoint import EVENTS, GENERATION_ERRORS, Endpoint, Reply
from ziphius.frontend.error_responses import json_response
from ziphius.frontend.generate import GenerateRequest, generate
from ziphius.frontend.model import ServedModel
from ziphius.frontend.protocol import refuse_unsupported
from ziphius.frontend.requests import numbered_rids, one_rid, read_json, several_rids
from ziphius.frontend.sampling import CheckedSampling, SamplingRequest, check_token_ids, checked, in_range
from ziphius.frontend.service import Service
from ziphius.frontend.sglang_answers import GenerateAnswer
from ziphius.frontend.sglang_bodies import GenerateBody, SglangSampling
from ziphius.frontend.sglang_format import SglangFormat, SglangOptions, per_sequence
from ziphius.frontend.sse import GenerationResponse

MAX_TOP_LOGPROBS = 128

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class _PromptOptions:
    """The options that a batch may give for each prompt."""

    sampling: CheckedSampling
    logprobs: bool
    top_logprobs: bool


async def _generate(service: Service, request: Request) -> Response:
    received_at = time.time()
    body = await read_json(request, GenerateBody, service.config.max_body_bytes)
    model = service.require_model()
    prompts = _GeneratePrompts(body)
    if prompts.count == 0:
        return json_response([])
    # First, because there may be many prompts and each may have options that are to be checked
    service.client.check_room(prompts.count)
    options = _options(model, body, prompts.count)
    copies = options[0].sampling.copies
    wanted = GenerateRequest(
        prompts=prompts,
        sampling=[option.sampling for option in options],
        rids=_rids(body.rid, prompts.count, copies),
        group_rid=body.rid if isinstance(body.rid, str) else None,
        streaming=bool(body.stream),
    )
    generation = await generate(service.client, model, wanted)
    form = SglangFormat(
        SglangOptions(
            received_at=received_at,
            as_list=prompts.is_batch or copies > 1,
            logprobs=per_sequence([option.logprobs for option in options], copies),
            top_logprobs=per_sequence([option.top_logprobs for option in options], copies),
            text_in_logprobs=bool(body.return_text_in_logprobs),
            prompt_token_ids=bool(body.return_prompt_token_ids),
        ),
        model.tokenizer,
    )
    return GenerationResponse(generation, form, service.write_timeout_s)


class _GeneratePrompts:
    """`text` or `input_ids` of /generate, one or a list. Token ids win over text, as in SGLang."""

    def __init__(self, body: GenerateBody) -> None:
        """InvalidRequest when there is neither, or ids are mixed with lists of ids."""
        self._text, self._input_ids = body.text, body.input_ids
        self.is_batch = isinstance(body.text, list)
        if body.input_ids is not None:
            nested = [item for item in body.input_ids if isinstance(item, list)]
            if nested and len(nested) != len(body.input_ids):
                raise InvalidRequest("input_ids must hold only token ids or only lists of them", param="input_ids")
            if not body.input_ids:
                raise InvalidRequest("input_ids cannot be empty.", param="input_ids")
            self.is_batch = bool(nested)
        elif body.text is None:
            raise InvalidRequest("Either text or input_ids should be provided.", param="text")
        self.count = len(body.input_ids or body.text or "") if self.is_batch else 1

    async def encode(self, model: ServedModel) -> list[list[int]]:
        if self._input_ids is None:
            texts = [self._text] if isinstance(self._text, str) else self._text or []
            return [await model.encode(text, "text") for text in texts]
        batch = [item for item in self._input_ids if isinstance(item, list)]
        batch = batch or [[item for item in self._input_ids if isinstance(item, int)]]
        for ids in batch:
            if not ids:
                raise InvalidRequest("input_ids cannot be empty.", param="input_ids")
            check_token_ids(ids, "input_ids", model.limits.vocab_size)
        return batch


def _options(model: ServedModel, body: GenerateBody, count: int) -> list[_PromptOptions]:
    """Each prompt's options: one value for all of them, or a list with one for each."""
    params = _spread(body.sampling_params, count, SglangSampling(), "sampling_params")
    logprobs = _spread(body.return_logprob, count, False, "return_logprob")
    starts = _spread(body.logprob_start_len, count, -1, "logprob_start_len")
    tops = _spread(body.top_logprobs_num, count, 0, "top_logprobs_num")
    options: list[_PromptOptions] = []
    for i in range(count):
        if i and not any(isinstance(v, list) for v in (body.sampling_params, body.return_logprob,
                                                       body.logprob_start_len, body.top_logprobs_num)):  # fmt: skip
            options.append(options[0])
            continue
        refuse_unsupported(params[i], "sampling_params.")
        if starts[i] < -1:
            raise InvalidRequest("logprob_start_len must be at least -1.", param="logprob_start_len")
        request = sglang_sampling(params[i], logprobs[i], tops[i], starts[i])
        sampling = checked(request, model.tokenizer, model.limits)
        options.append(_PromptOptions(sampling, logprobs[i], logprobs[i] and tops[i] > 0))
    if any(option.sampling.copies != options[0].sampling.copies for option in options):
        raise InvalidRequest("n must be the same for each prompt of a batch", param="sampling_params.n")
    return options


def sglang_sampling(sampling: SglangSampling, logprobs: bool, top_logprobs: int, logprobs_from: int) -> SamplingRequest:
    """`top_logprobs` and `logprobs_from` are /generate's top_logprobs_num and logprob_start_len."""
    return SamplingRequest(
        fields=sampling,
        max_new_tokens=sampling.max_new_tokens,
        default_new_tokens=128,
        min_new_tokens=sampling.min_new_tokens or 0,
        seed=sampling.sampling_seed,
        logprobs=logprobs,
        top_logprobs=in_range("top_logprobs_num", top_logprobs, 0, MAX_TOP_LOGPROBS) if logprobs else 0,
        prompt_logprobs_from=logprobs_from if logprobs else -1,
        names={"prompt_logprobs_from": "logprob_start_len"},
        prefix="sampling_params.",
    )


def _spread(value: _Value | list[_Value] | None, count: int, default: _Value, name: str) -> list[_Value]:
    if value is None:
        return [default] * count
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name} has {len(value)} entries for {count} prompts", param=name)
    return value


def _rids(rid: str | list[str] | None, count: int, copies: int) -> list[str]:
    """One for each sequence. If the caller gave none, each sequence gets a random one."""
    if rid is None:
        return [one_rid(None) for _ in range(count * copies)]
    if isinstance(rid, str):
        return numbered_rids(one_rid(rid), count * copies)
    if len(rid) != count:
        raise InvalidRequest(f"rid has {len(rid)} entries for {count} prompts", param="rid")
    return several_rids(rid, copies)


ENDPOINTS = (
    Endpoint(
        "/generate", ("POST", "PUT"), _generate, "The continuation of one or several prompts, in SGLang's shape",
        body=GenerateBody,
        replies=(
            Reply(200, "the answer; a list for a batch or copies; with `stream` as events",
                  GenerateAnswer | list[GenerateAnswer]),
            Reply(200, "events: `data:` and the whole answer so far as JSON, at last `[DONE]`", str, EVENTS),
        ),
        errors=GENERATION_ERRORS,
    ),
)  # fmt: skip
