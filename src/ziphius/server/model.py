"""ServedModel: the model behind the API and its limits; turns prompts into token ids and generates nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from ziphius.errors import InvalidRequest, RequestError, UnknownModel, UnsupportedField
from ziphius.models.sampling_defaults import SamplingDefaults
from ziphius.server.protocol import ChatMessage, refuse_unsupported
from ziphius.server.sampling import ModelLimits
from ziphius.tokenizer.tokenizer import Tokenizer

ROLES = frozenset({"system", "user", "assistant", "tool", "function", "developer", "latest_reminder", "root"})
"""SGLang's. The template decides what it makes of the rarer ones."""
DEFAULT_ALIAS = "default"
"""SGLang's name for whatever model there is."""
_INLINE_CHARACTERS = 20_000
"""A text of this size is encoded in a few milliseconds; a longer one goes to a thread, so that streams flow on."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about the checkpoint for those who ask."""

    name: str
    path: str
    architecture: str
    model_type: str
    vocab_size: int
    created: int
    """Seconds since the epoch when it was opened."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """For requests to OpenAI's routes that leave sampling open."""


class ServedModel:
    """The model, its tokenizer and, once the engine is ready, its limits."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.limits = ModelLimits(info.vocab_size, 0)
        """The context is 0 until the engine has told it."""
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def check_name(self, name: str | None) -> None:
        """UnknownModel unless `name` is absent, this model's, or `default`."""
        if name is not None and name not in (self.info.name, DEFAULT_ALIAS):
            shown = name if len(name) <= 200 else name[:200] + "…"
            raise UnknownModel(f"The model '{shown}' does not exist", param="model")

    async def encode(self, text: str, param: str) -> list[int]:
        """Ids of a plain text, BOS included where the model wants one. InvalidRequest when there are none."""
        ids = await self._offloaded(text, True)
        if not ids:
            raise InvalidRequest("Prompt cannot be empty", param=param)
        return ids

    async def encode_chat(self, messages: Sequence[ChatMessage], continue_final: bool) -> list[int]:
        """Ids of the rendered conversation. InvalidRequest names the message at fault."""
        template = self.tokenizer.chat
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        if not messages:
            raise InvalidRequest("Messages cannot be empty.", param="messages")
        plain = [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if continue_final and plain[-1]["role"] != "assistant":
            raise InvalidRequest(
                "continue_final_message needs a final message of the assistant", param="continue_final_message"
            )
        text = template.render(
            plain, add_generation_prompt=not continue_final, continue_final_message=continue_final
        )  # fmt: skip
        ids = await self._offloaded(text, False)
        if not ids:
            raise InvalidRequest("the chat template makes an empty prompt of these messages", param="messages")
        return ids

    def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def _offloaded(self, text: str, add_special_tokens: bool) -> list[int]:
        encode = self.tokenizer.encode
        if len(text) <= _INLINE_CHARACTERS:
            return encode(text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode, text, add_special_tokens)


def _plain_message(message: ChatMessage, path: str) -> dict[str, str]:
    """The message as a template takes it: the text of its parts joined by a space, as SGLang does."""
    refuse_unsupported(message, path + ".")
    role = message.role.lower()
    if role not in ROLES:
        raise InvalidRequest(f"{path}.role must be one of {', '.join(sorted(ROLES))}", param=path + ".role")
    content = message.content
    if content is None and role != "assistant":
        raise InvalidRequest(f"{path}.content is required", param=path + ".content")
    if isinstance(content, list):
        content = " ".join(_texts(message, path))
    plain = {"role": role, "content": content or ""}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    return plain


def _texts(message: ChatMessage, path: str) -> list[str]:
    texts = []
    assert isinstance(message.content, list)
    for i, part in enumerate(message.content):
        where = f"{path}.content[{i}]"
        if part.type != "text":
            raise _unsupported_part(part.type, where + ".type")
        refuse_unsupported(part, where + ".")
        if part.text is None:
            raise InvalidRequest(f"{where}.text is required", param=where + ".text")
        texts.append(part.text)
    return texts


def _unsupported_part(kind: str, where: str) -> RequestError:
    return UnsupportedField(
        f"Model only supports text input; received unsupported content type '{kind[:40]}' in {where}.", param=where
    )
