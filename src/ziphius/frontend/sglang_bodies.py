"""The bodies that SGLang's routes take."""

from __future__ import annotations

from ziphius.frontend.protocol import Body, SamplingFields, Unsupported


class SglangSampling(SamplingFields):
    """`sampling_params` of /generate."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    spaces_between_special_tokens: bool | None = None
    """Without effect on byte-level tokenizers, in SGLang too."""
    stream_interval: Unsupported = None
    beam_width: Unsupported = None
    choice: Unsupported = None


class GenerateBody(Body):
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
    input_embeds: Unsupported = None
    image_data: Unsupported = None
    video_data: Unsupported = None
    audio_data: Unsupported = None
    modalities: Unsupported = None
    token_ids_logprob: Unsupported = None
    session_params: Unsupported = None
    session_id: Unsupported = None
    lora_path: Unsupported = None
    lora_id: Unsupported = None
    custom_logit_processor: Unsupported = None
    return_hidden_states: Unsupported = None
    return_routed_experts: Unsupported = None
    return_bytes: Unsupported = None
    return_entropy: Unsupported = None
    priority: Unsupported = None
    extra_key: Unsupported = None
    cache_salt: Unsupported = None
    custom_labels: Unsupported = None
    background: Unsupported = None
    require_reasoning: Unsupported = None
    max_thinking_tokens: Unsupported = None
    watermark: Unsupported = None
    return_sampling_mask: Unsupported = None


class AbortBody(Body):
    rid: str | None = None
    abort_all: bool | None = None
