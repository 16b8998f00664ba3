"""Checks the sampling options of a request and turns them into the engine's SamplingParams."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from ziphius.checkpoint.sampling_defaults import SamplingDefaults
from ziphius.errors import ContextLengthExceeded, InvalidRequest
from ziphius.frontend.protocol import SamplingFields
from ziphius.ipc.messages import SamplingParams
from ziphius.tokenizer.tokenizer import Tokenizer

MAX_COPIES = 128
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_TEMPERATURE = 1000.0
MIN_TEMPERATURE = 1e-5
"""Below it sampling is greedy: the logits divided by it would overflow."""
MAX_LOGIT_BIAS = 1e6
_SEED_BITS = (1 << 63) - 1

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The limits of a request to this engine, in tokens."""

    vocab_size: int
    """Ids below this may be sent to the model."""
    context_length: int
    """The most tokens of prompt and answer together; never more than the KV cache holds."""


@dataclass(slots=True)
class SamplingRequest:
    """What a caller asked for, under the engine's names, before the prompt is known and before `checked` checks it."""

    fields: SamplingFields
    max_new_tokens: int | None
    """None: `default_new_tokens`, or less when the context has less room."""
    default_new_tokens: int | None
    """None: as many as the context has room for."""
    min_new_tokens: int = 0
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs_from: int = -1
    names: Mapping[str, str] = field(default_factory=dict)
    """For messages: what the API calls a field whose name here is another. Names that are missing are the same."""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Values for what `fields` does not set."""
    prefix: str = ""
    """For messages: what stands before a field's name, when the fields lie inside an object of the body."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How an answer's tokens become text. The engine does not need it."""

    stops: tuple[str, ...] = ()
    stop_token_texts: Mapping[int, str] = field(default_factory=dict)
    """Stop strings that are special tokens, by id. They are invisible in text, so their ids must end the answer."""
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


@dataclass(frozen=True, slots=True)
class CheckedSampling:
    """Options that were checked and hold for any prompt. `params_for` adapts them to one prompt."""

    request: SamplingRequest
    copies: int
    text: TextOptions
    template: SamplingParams

    def params_for(self, prompt_tokens: int, copy: int, limits: ModelLimits) -> SamplingParams:
        """For one copy of one prompt. ContextLengthExceeded when prompt and answer do not fit the context together.

        InvalidRequest when log-probabilities are to begin after the prompt.
        """
        start = self.request.prompt_logprobs_from
        if start > prompt_tokens:
            name = self.request.names.get("prompt_logprobs_from", "prompt_logprobs_from")
            raise InvalidRequest(
                f"{name}={start} is higher than the number of input tokens ({prompt_tokens}). "
                f"Please use a smaller {name}.",
                param=name,
            )
        room = limits.context_length - prompt_tokens
        if room <= 0:
            raise ContextLengthExceeded(
                f"The input ({prompt_tokens} tokens) is longer than the model's context length "
                f"({limits.context_length} tokens).",
                param=None,
            )
        wanted = self.request.max_new_tokens
        if wanted is None:
            default = self.request.default_new_tokens
            wanted = room if default is None else min(default, room)
        elif wanted > room:
            raise ContextLengthExceeded(
                f"Requested token count exceeds the model's maximum context length of {limits.context_length} tokens. "
                f"You requested a total of {prompt_tokens + wanted} tokens: {prompt_tokens} tokens from the input and "
                f"{wanted} tokens for the completion. Please reduce the number of tokens in the input or the "
                f"completion to fit within the limit.",
                param=self.request.names.get("max_new_tokens", "max_new_tokens"),
            )
        if self.template.min_new_tokens > wanted:
            name = self.request.prefix + self.request.names.get("min_new_tokens", "min_new_tokens")
            raise ContextLengthExceeded(
                f"{name} is {_short(self.template.min_new_tokens)}, but after a prompt of {prompt_tokens} tokens only "
                f"{wanted} more fit the context of {limits.context_length} tokens.",
                param=name,
            )
        return msgspec.structs.replace(
            self.template,
            max_new_tokens=max(1, wanted),
            seed=_seed(self.request.seed, copy),
            prompt_logprobs_from=start if start < prompt_tokens else -1,
        )

    @property
    def wants_no_tokens(self) -> bool:
        """Whether max_new_tokens is 0: the engine always makes one token, and then it is thrown away."""
        return self.request.max_new_tokens == 0


def checked(request: SamplingRequest, tokenizer: Tokenizer, limits: ModelLimits) -> CheckedSampling:
    """InvalidRequest names the first field that is out of its range."""
    fields, prefix, defaults = request.fields, request.prefix, request.defaults
    copies = in_range(prefix + "n", 1 if fields.n is None else fields.n, 1, MAX_COPIES)
    _check_lengths(request)
    stops, stop_token_texts = _stops(fields.stop, prefix + "stop", tokenizer)
    stop_ids = _stop_token_ids(fields.stop_token_ids, prefix + "stop_token_ids", limits.vocab_size)
    template = SamplingParams(
        max_new_tokens=1,
        min_new_tokens=request.min_new_tokens,
        temperature=_temperature(prefix + "temperature", _given(fields.temperature, defaults.temperature, 1.0)),
        top_p=_top_p(prefix + "top_p", _given(fields.top_p, defaults.top_p, 1.0)),
        top_k=_top_k(prefix + "top_k", _given(fields.top_k, defaults.top_k, -1)),
        min_p=in_range(prefix + "min_p", _given(fields.min_p, defaults.min_p, 0.0), 0.0, 1.0),
        frequency_penalty=in_range(
            prefix + "frequency_penalty", _given(fields.frequency_penalty, None, 0.0), -2.0, 2.0
        ),
        presence_penalty=in_range(prefix + "presence_penalty", _given(fields.presence_penalty, None, 0.0), -2.0, 2.0),
        repetition_penalty=_repetition_penalty(
            prefix + "repetition_penalty", _given(fields.repetition_penalty, defaults.repetition_penalty, 1.0)
        ),
        logit_bias=_logit_bias(fields.logit_bias, prefix + "logit_bias", limits.vocab_size),
        seed=0,
        stop_token_ids=[*stop_ids, *stop_token_texts],
        ignore_eos=bool(fields.ignore_eos),
        logprobs=request.logprobs,
        top_logprobs=min(request.top_logprobs, limits.vocab_size),
        prompt_logprobs_from=request.prompt_logprobs_from,
    )
    text = TextOptions(stops, stop_token_texts, fields.skip_special_tokens is not False, bool(fields.no_stop_trim))
    return CheckedSampling(request, copies, text, template)


def check_token_ids(ids: Sequence[int], name: str, vocab_size: int) -> None:
    """InvalidRequest for an id that the model does not have."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequest(f"{name}: token id {_short(wrong)} is not in [0, {vocab_size - 1}]", param=name)


def _check_lengths(request: SamplingRequest) -> None:
    names, prefix = request.names, request.prefix
    longest = prefix + names.get("max_new_tokens", "max_new_tokens")
    shortest = prefix + names.get("min_new_tokens", "min_new_tokens")
    if request.max_new_tokens is not None and request.max_new_tokens < 0:
        raise InvalidRequest(f"{longest} must be at least 0, got {_short(request.max_new_tokens)}.", param=longest)
    if request.min_new_tokens < 0:
        raise InvalidRequest(f"{shortest} must be at least 0, got {_short(request.min_new_tokens)}.", param=shortest)
    limit = request.max_new_tokens
    if limit is None:
        limit = request.default_new_tokens
    if limit is not None and request.min_new_tokens > limit:
        raise InvalidRequest(
            f"{shortest} must be in [0, {longest} ({limit})], got {_short(request.min_new_tokens)}.", param=shortest
        )


def _stops(value: str | list[str] | None, name: str, tokenizer: Tokenizer) -> tuple[tuple[str, ...], dict[int, str]]:
    """The stop strings to look for in text, and by id those that are special tokens."""
    if not value:
        return (), {}
    stops = [value] if isinstance(value, str) else value
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"{name} may hold at most {MAX_STOPS} strings, got {len(stops)}.", param=name)
    if not all(stops):
        raise InvalidRequest(f"{name} must not hold an empty string.", param=name)
    longest = max(map(len, stops))
    if longest > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            f"{name}: a stop string may have at most {MAX_STOP_CHARACTERS} characters, got {longest}.", param=name
        )
    special: dict[int, str] = {}
    for stop in stops:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) == 1 and ids[0] in tokenizer.special_ids:
            special[ids[0]] = stop
    return tuple(dict.fromkeys(stops)), special


def _stop_token_ids(ids: list[int] | None, name: str, vocab_size: int) -> list[int]:
    ids = list(dict.fromkeys(ids or []))
    check_token_ids(ids, name, vocab_size)
    return ids


def _logit_bias(bias: Mapping[str, float] | None, name: str, vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequest(f"{name} must have keys in [0, {vocab_size - 1}], got {key[:40]}.", param=name)
        result[int(key)] = in_range(name, value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return result


def _given(value: _Number | None, suggested: _Number | None, default: _Number) -> _Number:
    """The caller's value, else the one that the model's authors suggest, else the API's default."""
    if value is not None:
        return value
    return default if suggested is None else suggested


def in_range(name: str, value: _Number, low: _Number, high: _Number) -> _Number:
    """`value`. InvalidRequest names `name` when it is not in [low, high]."""
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be in [{low}, {high}], got {_short(value)}.", param=name)
    return value


def _temperature(name: str, value: float) -> float:
    if not 0.0 <= value <= MAX_TEMPERATURE:
        limits = f"a non-negative number of at most {MAX_TEMPERATURE:g}"
        raise InvalidRequest(f"{name} must be {limits}, got {value}.", param=name)
    return 0.0 if value < MIN_TEMPERATURE else value


def _top_p(name: str, value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise InvalidRequest(f"{name} must be in (0, 1], got {value}.", param=name)
    return value


def _top_k(name: str, value: int) -> int:
    if value != -1 and value < 1:
        raise InvalidRequest(f"{name} must be -1 (disable) or at least 1, got {_short(value)}.", param=name)
    return min(value, _SEED_BITS)


def _repetition_penalty(name: str, value: float) -> float:
    if not 0.0 < value <= 2.0:
        raise InvalidRequest(f"{name} must be in (0, 2], got {value}.", param=name)
    return value


def _seed(seed: int | None, copy: int) -> int:
    """A seed of 63 bits for one copy.

    The first copy has the caller's seed and the others have seeds that are made from it. Without one, each is random.
    """
    if seed is None:
        return random.getrandbits(63)
    if copy == 0:
        return seed & _SEED_BITS
    # splitmix64's output function (Steele, Lea, Flood 2014): copies must not share their draws
    mixed = (seed + copy * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) & _SEED_BITS


def _short(number: float) -> str:
    """A number as text. A number from a caller may have thousands of digits."""
    if isinstance(number, int) and abs(number) >= 10**20:
        return "a number of that size"
    return str(number)
