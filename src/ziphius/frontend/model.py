"""ServedModel: the model behind the API, its tokenizer and its limits. It turns prompts into token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ziphius.checkpoint.sampling_defaults import SamplingDefaults
from ziphius.errors import ContextLengthExceeded, InvalidRequest, RequestError, UnknownModel, UnsupportedField
from ziphius.frontend.openai_bodies import ChatMessage
from ziphius.frontend.protocol import refuse_unsupported
from ziphius.frontend.sampling import ModelLimits
from ziphius.tokenizer.tokenizer import Tokenizer

ROLES = frozenset({"system", "user", "assistant", "tool", "function", "developer", "latest_reminder", "root"})
"""The roles that SGLang knows. What a rare one means is up to the chat template."""
DEFAULT_ALIAS = "default"
"""SGLang's name for the model that is served, whatever its name is."""
_INLINE_CHARACTERS = 20_000
"""A text of this size takes a few milliseconds to encode. A longer one goes to a thread, so that no stream waits."""
_MESSAGE_CHARACTERS = 100
"""Rendering a message takes as long as encoding so many characters."""
_SHOWN_CHARACTERS = 40
"""So much of what a caller wrote is repeated in an error about it."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about the checkpoint."""

    name: str
    path: str
    architecture: str
    model_type: str
    vocab_size: int
    created: int
    """Seconds since the epoch when it was opened."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Values for what a request to OpenAI's routes does not set."""


class ServedModel:
    """The model, its tokenizer and, once the engine is ready, its limits."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.limits = ModelLimits(info.vocab_size, 0)
        """The context length is 0 until the engine is ready."""
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def check_name(self, name: str | None) -> None:
        """UnknownModel unless `name` is absent, this model's, or `default`."""
        if name is not None and name not in (self.info.name, DEFAULT_ALIAS):
            shown = name if len(name) <= 200 else name[:200] + "…"
            raise UnknownModel(f"The model '{shown}' does not exist", param="model")

    async def encode(self, text: str, param: str) -> list[int]:
        """The ids of a plain text, with BOS if the model wants it. InvalidRequest when there are none."""
        ids = await self._encoded(len(text), lambda: self._encode(text, add_special_tokens=True))
        if not ids:
            raise InvalidRequest("Prompt cannot be empty", param=param)
        return ids

    async def encode_chat(self, messages: Sequence[ChatMessage], continue_final: bool) -> list[int]:
        """The ids of the rendered conversation. InvalidRequest names the message that is wrong."""
        template = self.tokenizer.chat
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        if not messages:
            raise InvalidRequest("Messages cannot be empty.", param="messages")
        if len(messages) > self.limits.context_length:
            raise ContextLengthExceeded(
                f"{len(messages)} messages are more than fit the model's context length "
                f"({self.limits.context_length} tokens).",
                param="messages",
            )

        def render_and_encode() -> list[int]:
            plain = [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
            if continue_final and plain[-1]["role"] != "assistant":
                raise InvalidRequest(
                    "continue_final_message needs a final message of the assistant", param="continue_final_message"
                )
            text = template.render(
                plain, add_generation_prompt=not continue_final, continue_final_message=continue_final
            )  # fmt: skip
            return self._encode(text, add_special_tokens=False)

        ids = await self._encoded(_characters(messages), render_and_encode)
        if not ids:
            raise InvalidRequest("the chat template makes an empty prompt of these messages", param="messages")
        return ids

    async def _encoded(self, characters: int, encode: Callable[[], list[int]]) -> list[int]:
        """What `encode` returns. It runs in a thread when there are many characters."""
        if characters <= _INLINE_CHARACTERS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > _INLINE_CHARACTERS:
            # Tens of megabytes take half a minute to encode: refuse before that what is too long in any case
            fewest = len(text) // self.tokenizer.longest_piece
            if fewest > self.limits.context_length:
                raise ContextLengthExceeded(
                    f"The input (at least {fewest} tokens) is longer than the model's context length "
                    f"({self.limits.context_length} tokens)."
                )
        return self.tokenizer.encode(text, add_special_tokens)


def _characters(messages: Sequence[ChatMessage]) -> int:
    """About how much there is to render and encode."""
    total = len(messages) * _MESSAGE_CHARACTERS
    for message in messages:
        if isinstance(message.content, list):
            total += sum(1 + len(part.text or "") for part in message.content)
        else:
            total += len(message.content or "")
    return total


def _plain_message(message: ChatMessage, path: str) -> dict[str, str]:
    """The message as a template takes it: the text of its parts joined by a space, as SGLang does."""
    refuse_unsupported(message, path + ".")
    role = message.role.lower()
    if role not in ROLES:
        raise InvalidRequest(
            f"{path}.role must be one of {', '.join(sorted(ROLES))}, not {role[:_SHOWN_CHARACTERS]!r}",
            param=path + ".role",
        )
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
        f"Model only supports text input; received unsupported content type '{kind[:_SHOWN_CHARACTERS]}' in {where}.",
        param=where,
    )
