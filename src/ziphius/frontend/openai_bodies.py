"""The bodies that OpenAI's routes take."""

from __future__ import annotations

from typing import Any

from ziphius.frontend.protocol import Body, SamplingFields, Unsupported


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
    # Taken without effect on the answer:
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    response_format: Unsupported = None
    lora_path: Unsupported = None
    session_id: Unsupported = None
    session_params: Unsupported = None
    custom_logit_processor: Unsupported = None
    images_config: Unsupported = None
    mm_processor_kwargs: Unsupported = None
    return_hidden_states: Unsupported = None
    return_routed_experts: Unsupported = None
    return_token_ids: Unsupported = None
    return_prompt_token_ids: Unsupported = None
    return_meta_info: Unsupported = None
    priority: Unsupported = None
    extra_key: Unsupported = None
    cache_salt: Unsupported = None
    service_tier: Unsupported = None
    moderation: Unsupported = None


class ContentPart(Body):
    type: str
    text: str | None = None
    image_url: Unsupported = None
    input_audio: Unsupported = None
    file: Unsupported = None
    video_url: Unsupported = None
    audio_url: Unsupported = None
    refusal: Unsupported = None


class ChatMessage(Body):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What the `openai` client writes when an earlier answer is sent back:
    refusal: str | None = None
    annotations: list[Any] | None = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    tools: Unsupported = None


class ChatBody(OpenAIBody, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    continue_final_message: bool | None = None
    # Taken without effect, because there are no tools and no separate reasoning:
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    modalities: Unsupported = None
    reasoning_effort: Unsupported = None
    thinking: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    store: Unsupported = None
    chat_template_kwargs: Unsupported = None
    input_ids: Unsupported = None


class CompletionBody(OpenAIBody, kw_only=True):
    prompt: str | list[int | str | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: Unsupported = None
