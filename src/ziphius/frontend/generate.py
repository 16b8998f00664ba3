"""The one way from a request to a running generation. Every API calls `generate`, with prompts and checked sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ziphius.frontend.answer_text import MakeParser, PlainText
from ziphius.frontend.engine_client import EngineClient
from ziphius.frontend.model import ServedModel
from ziphius.frontend.openai_bodies import ChatMessage
from ziphius.frontend.sampling import CheckedSampling
from ziphius.frontend.stream import Generation, SequenceRequest


class Prompts(Protocol):
    """The prompts of one request, before they are token ids."""

    @property
    def count(self) -> int:
        """How many there are; at least one."""
        ...

    async def encode(self, model: ServedModel) -> list[list[int]]:
        """The token ids of each. RequestError for a prompt that the model cannot take."""
        ...


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation that the model's chat template turns into one prompt."""

    messages: Sequence[ChatMessage]
    continue_final: bool = False
    """The last message is the beginning of the answer."""
    count: int = 1

    async def encode(self, model: ServedModel) -> list[list[int]]:
        return [await model.encode_chat(self.messages, self.continue_final)]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """One prompt of token ids that need no check."""

    ids: list[int]
    count: int = 1

    async def encode(self, model: ServedModel) -> list[list[int]]:
        return [self.ids]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What an API asks of the model. Sequences are the copies of the first prompt, then those of the second, ..."""

    prompts: Prompts
    sampling: Sequence[CheckedSampling]
    """One for each prompt. All ask for the same number of copies."""
    rids: Sequence[str]
    """One for each sequence. The caller sees them and can abort by them."""
    group_rid: str | None
    """The id that aborts all sequences. None: each can be aborted by its own rid only."""
    streaming: bool
    """False: the caller waits for the whole answer."""
    make_parser: MakeParser = PlainText
    """Makes the parser of each sequence: the stage between stop strings and the API's format."""


async def generate(client: EngineClient, model: ServedModel, request: GenerateRequest) -> Generation:
    """Start all sequences of `request`, or none of them. Whoever calls it must close the generation.

    RequestError for prompts that the model cannot take, alone or with the answer that was asked for, and for a rid
    that is in use; Overloaded when the server is full, which is known before prompts are encoded.
    """
    client.check_room(request.prompts.count * request.sampling[0].copies)
    prompts = await request.prompts.encode(model)
    return client.submit(list(_sequences(model, request, prompts)), model.tokenizer, request.streaming)


def _sequences(model: ServedModel, request: GenerateRequest, prompts: Sequence[list[int]]) -> Iterator[SequenceRequest]:
    rids = iter(request.rids)
    for prompt, sampling in zip(prompts, request.sampling, strict=True):
        for copy in range(sampling.copies):
            rid = next(rids)
            yield SequenceRequest(
                public_rid=rid,
                group_rid=request.group_rid or rid,
                prompt_ids=prompt,
                sampling=sampling.params_for(len(prompt), copy, model.limits),
                text=sampling.text,
                wants_no_tokens=sampling.wants_no_tokens,
                make_parser=request.make_parser,
            )
