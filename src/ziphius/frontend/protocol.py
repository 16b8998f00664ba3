"""The bodies of requests, typed, and how bytes become one of them; it computes nothing from their values.

A field that is not declared here is an error, so that no caller believes in something that was ignored.
Fields of OpenAI or SGLang that Ziphius does not have are declared as `Any` and named in a body's `REFUSED`:
they may be null, false, empty or at their neutral value, which ask for nothing.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, TypeVar

import msgspec

from ziphius.errors import InvalidRequest, RequestError, UnsupportedField


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    REFUSED: ClassVar[tuple[str, ...]] = ()


class SamplingFields(Body):
    """Fields that mean the same in each API. None: not given."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    # Not here:
    stop_regex: Any = None
    regex: Any = None
    ebnf: Any = None
    json_schema: Any = None
    structural_tag: Any = None
    custom_params: Any = None
    watermark: Any = None


_SAMPLING_REFUSED = (
    "stop_regex", "regex", "ebnf", "json_schema", "structural_tag", "custom_params", "watermark",
)  # fmt: skip


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """OpenAI's padding against traffic analysis: accepted, never sent."""


class OpenAIBody(SamplingFields):
    """What chat and completions share."""

    model: str | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: str | None = None
    # Notes of the caller's, without effect on the answer:
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    # Not here:
    response_format: Any = None
    lora_path: Any = None
    session_id: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None
    images_config: Any = None
    mm_processor_kwargs: Any = None
    return_hidden_states: Any = None
    return_routed_experts: Any = None
    return_token_ids: Any = None
    return_prompt_token_ids: Any = None
    return_meta_info: Any = None
    priority: Any = None
    extra_key: Any = None
    cache_salt: Any = None
    service_tier: Any = None
    moderation: Any = None


_OPENAI_REFUSED = (
    *_SAMPLING_REFUSED, "response_format", "lora_path", "session_id", "session_params", "custom_logit_processor",
    "images_config", "mm_processor_kwargs", "return_hidden_states", "return_routed_experts", "return_token_ids",
    "return_prompt_token_ids", "return_meta_info", "priority", "extra_key", "cache_salt", "service_tier",
    "moderation",
)  # fmt: skip


class ContentPart(Body):
    REFUSED = ("image_url", "input_audio", "file", "video_url", "audio_url", "refusal")

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None
    audio_url: Any = None
    refusal: Any = None


class ChatMessage(Body):
    REFUSED = ("tool_calls", "function_call", "audio", "tools")

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What the `openai` client writes when an earlier answer is sent back:
    refusal: str | None = None
    annotations: list[Any] | None = None
    # Not here:
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None
    tools: Any = None


class ChatBody(OpenAIBody, kw_only=True):
    REFUSED = (
        *_OPENAI_REFUSED, "tools", "tool_choice", "functions", "function_call", "audio", "prediction", "modalities",
        "reasoning_effort", "thinking", "verbosity", "web_search_options", "store", "chat_template_kwargs", "input_ids",
    )  # fmt: skip

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    continue_final_message: bool | None = None
    # Without effect where there are no tools and no separate reasoning:
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    # Not here:
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    thinking: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    store: Any = None
    chat_template_kwargs: Any = None
    input_ids: Any = None


class CompletionBody(OpenAIBody, kw_only=True):
    REFUSED = (*_OPENAI_REFUSED, "best_of")

    prompt: str | list[int | str | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    # Not here:
    best_of: Any = None


class SglangSampling(SamplingFields):
    """`sampling_params` of /generate."""

    REFUSED = (*_SAMPLING_REFUSED, "stream_interval", "beam_width", "choice")

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    spaces_between_special_tokens: bool | None = None
    """Without effect on byte-level tokenizers, in SGLang too."""
    # Not here:
    stream_interval: Any = None
    beam_width: Any = None
    choice: Any = None


class GenerateBody(Body):
    REFUSED = (
        "input_embeds", "image_data", "video_data", "audio_data", "modalities", "token_ids_logprob", "session_params",
        "session_id", "lora_path", "lora_id", "custom_logit_processor", "return_hidden_states", "return_routed_experts",
        "return_bytes", "return_entropy", "priority", "extra_key", "cache_salt", "custom_labels", "background",
        "require_reasoning", "max_thinking_tokens", "watermark", "return_sampling_mask",
    )  # fmt: skip

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    return_prompt_token_ids: bool | None = None
    stream: bool | None = None
    # Without effect on the answer:
    log_metrics: bool | None = None
    no_logs: bool | None = None
    # Not here:
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    modalities: Any = None
    token_ids_logprob: Any = None
    session_params: Any = None
    session_id: Any = None
    lora_path: Any = None
    lora_id: Any = None
    custom_logit_processor: Any = None
    return_hidden_states: Any = None
    return_routed_experts: Any = None
    return_bytes: Any = None
    return_entropy: Any = None
    priority: Any = None
    extra_key: Any = None
    cache_salt: Any = None
    custom_labels: Any = None
    background: Any = None
    require_reasoning: Any = None
    max_thinking_tokens: Any = None
    watermark: Any = None
    return_sampling_mask: Any = None


class AbortBody(Body):
    rid: str | None = None
    abort_all: bool | None = None


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "best_of": (1,),
    "modalities": (["text"], ["text", "text"]),
    "service_tier": ("auto", "default"),
    "stream_interval": (1,),
    "beam_width": (1,),
}
"""Values, besides null, false and empty ones, that ask for nothing."""

_SHOWN_CHARACTERS = 200
"""Of a name that the caller made up, in an error about it."""

_T = TypeVar("_T", bound=Body)
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)


def parse(data: bytes, kind: type[_T]) -> _T:
    """`data` as a `kind`. InvalidRequest and UnsupportedField name the field at fault."""
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as e:
        raise _validation_error(str(e)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise InvalidRequest(f"the body is not valid JSON: {e}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    refuse_unsupported(body, "")
    return body


def refuse_unsupported(body: Body, path: str) -> None:
    """UnsupportedField for the first field in `REFUSED` that asks for something. `path` goes before its name."""
    for name in body.REFUSED:
        value = getattr(body, name)
        if value is None or value is False or value in ("", [], {}) or value in _NEUTRAL.get(name, ()):
            continue
        raise UnsupportedField(f"{path}{name} is not supported by this server", param=path + name)


def _validation_error(text: str) -> RequestError:
    found = _WHERE.match(text)
    assert found is not None
    path = (found["path"] or "").removeprefix("$").removeprefix(".")
    unknown = _UNKNOWN.match(found["what"])
    if unknown is not None:
        name = (f"{path}.{unknown['name']}" if path else unknown["name"])[:_SHOWN_CHARACTERS]
        return InvalidRequest(f"unrecognized field: {name}", param=name)
    missing = _MISSING.match(found["what"])
    if missing is not None:
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"{name} is required", param=name)
    what = found["what"][:1].lower() + found["what"][1:]
    return InvalidRequest(f"{path or 'the body'}: {what}", param=path or None)
