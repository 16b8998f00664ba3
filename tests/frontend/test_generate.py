"""The use case behind every API: which sequences it starts, and what it refuses before prompts are encoded."""

from __future__ import annotations

import asyncio

import pytest
import server_fakes as fakes

from ziphius.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from ziphius.frontend.engine_client import EngineClient, EngineEvents
from ziphius.frontend.generate import ChatPrompt, GenerateRequest, TokenPrompt, generate
from ziphius.frontend.metrics import Metrics
from ziphius.frontend.model import ModelInfo, ServedModel
from ziphius.frontend.openai_bodies import ChatMessage
from ziphius.frontend.protocol import SamplingFields
from ziphius.frontend.sampling import ModelLimits, SamplingRequest, checked
from ziphius.ipc.messages import AddRequest, Finish, RequestOutput, StepOutput
from ziphius.tokenizer.tokenizer import Tokenizer

CAPACITY = 4


class Wire:
    def __init__(self):
        self.sent = []
        self.messages = asyncio.Queue()

    async def send(self, message):
        self.sent.append(message)

    async def receive(self):
        return await self.messages.get()


class Two:
    """Two prompts, which may not be encoded when `forbidden`."""

    count = 2

    def __init__(self, forbidden=False):
        self.forbidden = forbidden

    async def encode(self, model):
        assert not self.forbidden
        return [[1], [2, 3]]


class Reasoning:
    """A parser that takes what stands before "|" away from the text."""

    def __init__(self):
        self.inside = True

    def push(self, text, delta):
        if self.inside and "|" in text:
            self.inside, text = False, text.partition("|")[2]
        delta.text += "" if self.inside else text

    def end(self, delta):
        delta.text += "."


def run(scenario):
    async def main():
        wire, metrics = Wire(), Metrics()
        events = EngineEvents(lambda progress: None, lambda ready: None, lambda fatal: None)
        client = EngineClient(wire, CAPACITY, metrics, events)
        tokenizer = Tokenizer.from_files(fakes.tokenizer_files())
        model = ServedModel(ModelInfo("m", "/m", "X", "x", fakes.VOCAB_SIZE, 0), tokenizer)
        model.limits = ModelLimits(fakes.VOCAB_SIZE, fakes.CONTEXT)
        carrying = asyncio.create_task(client.run())
        await scenario(wire, client, model)
        carrying.cancel()

    asyncio.run(main())


def sampling(model, copies=1, **options):
    asked = SamplingRequest(SamplingFields(n=copies), max_new_tokens=9, default_new_tokens=None, seed=5, **options)
    return checked(asked, model.tokenizer, model.limits)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_copies_of_a_prompt_are_adjacent_and_have_seeds_of_their_own():
    async def scenario(wire, client, model):
        request = GenerateRequest(Two(), [sampling(model, 2)] * 2, ["a", "b", "c", "d"], "all", streaming=False)
        generation = await generate(client, model, request)
        await settle()
        added = [message for message in wire.sent if isinstance(message, AddRequest)]
        assert [message.prompt_ids for message in added] == [[1], [1], [2, 3], [2, 3]]
        assert [stream.request.public_rid for stream in generation.streams] == ["a", "b", "c", "d"]
        assert {stream.request.group_rid for stream in generation.streams} == {"all"}
        seeds = [message.sampling.seed for message in added]
        assert seeds[0] == seeds[2] == 5
        assert seeds[1] == seeds[3] != 5

    run(scenario)


def test_sequences_without_a_group_are_aborted_by_their_own_names():
    async def scenario(wire, client, model):
        request = GenerateRequest(Two(), [sampling(model)] * 2, ["a", "b"], None, streaming=False)
        generation = await generate(client, model, request)
        client.abort("b")
        assert [stream.finish is not None for stream in generation.streams] == [False, True]

    run(scenario)


def test_room_is_asked_for_before_prompts_are_encoded():
    async def scenario(wire, client, model):
        first = GenerateRequest(Two(), [sampling(model)] * 2, ["a", "b"], None, streaming=False)
        await generate(client, model, first)
        full = GenerateRequest(Two(forbidden=True), [sampling(model, 2)] * 2, list("cdef"), None, streaming=False)
        with pytest.raises(Overloaded):
            await generate(client, model, full)
        never = GenerateRequest(Two(forbidden=True), [sampling(model, 3)] * 2, list("cdefgh"), None, streaming=False)
        with pytest.raises(InvalidRequest):
            await generate(client, model, never)

    run(scenario)


def test_nothing_is_started_when_one_prompt_cannot_be_answered():
    async def scenario(wire, client, model):
        late = sampling(model, logprobs=True, prompt_logprobs_from=2)
        request = GenerateRequest(Two(), [sampling(model), late], ["a", "b"], None, streaming=False)
        await generate(client, model, request)
        request = GenerateRequest(Two(), [late, sampling(model)], ["c", "d"], None, streaming=False)
        with pytest.raises(InvalidRequest, match="prompt_logprobs_from=2 is higher"):
            await generate(client, model, request)
        long = GenerateRequest(TokenPrompt([1] * 600), [sampling(model)], ["e"], None, streaming=False)
        with pytest.raises(ContextLengthExceeded):
            await generate(client, model, long)
        assert client.num_open == 2

    run(scenario)


def test_each_sequence_has_the_parser_that_the_request_names():
    async def scenario(wire, client, model):
        chat = ChatPrompt([ChatMessage(role="user", content="hi")])
        request = GenerateRequest(chat, [sampling(model, 2)], ["a", "b"], None, streaming=True, make_parser=Reasoning)
        generation = await generate(client, model, request)
        rids = [stream.engine_rid for stream in generation.streams]
        for first, second in (("h", "x|y"), ("m|z", "!")):
            pieces = zip(rids, (first, second), strict=True)
            outputs = [RequestOutput(rid=rid, token_ids=list(piece.encode())) for rid, piece in pieces]
            wire.messages.put_nowait(StepOutput(outputs=outputs))
        ends = [RequestOutput(rid=rid, finish=Finish("length")) for rid in rids]
        wire.messages.put_nowait(StepOutput(outputs=ends))
        await settle()
        assert [stream.take().text for stream in await generation.news()] == ["z.", "y!."]

    run(scenario)
