"""EngineClient against an engine that says anything at any time: each request ends once, and places come back."""

from __future__ import annotations

import asyncio

import pytest
import server_fakes as fakes
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.errors import EngineFailed, InvalidRequest, Overloaded
from ziphius.frontend.engine_client import EngineClient, EngineEvents
from ziphius.frontend.metrics import Metrics
from ziphius.frontend.sampling import TextOptions
from ziphius.frontend.stream import SequenceRequest
from ziphius.ipc.messages import AbortRequest, AddRequest, Finish, RequestOutput, SamplingParams, StepOutput
from ziphius.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_files(fakes.tokenizer_files())
CAPACITY = 4


class Wire:
    """The engine's end, in the test's hands."""

    def __init__(self) -> None:
        self.sent = []
        self.messages = asyncio.Queue()

    async def send(self, message):
        self.sent.append(message)

    async def receive(self):
        return await self.messages.get()


def ignore(message):
    pass


class Bench:
    def __init__(self) -> None:
        self.wire = Wire()
        self.metrics = Metrics()
        self.client = EngineClient(self.wire, CAPACITY, self.metrics, EngineEvents(ignore, ignore, ignore))
        self.generations = []
        self.finishes = {}
        self.named = 0

    def submit(self, count, streaming, stops=()):
        requests = []
        for _ in range(count):
            self.named += 1
            rid = f"r{self.named}"
            sampling = SamplingParams(max_new_tokens=9, seed=1)
            requests.append(SequenceRequest(rid, rid, [1, 2], sampling, TextOptions(stops=stops)))
        generation = self.client.submit(requests, TOKENIZER, streaming)
        self.generations.append(generation)
        return generation

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)
        for generation in self.generations:
            for stream in generation.streams:
                before = self.finishes.get(stream.engine_rid)
                assert before is None or before is stream.finish  # set once, for good
                self.finishes[stream.engine_rid] = stream.finish

    def unanswered(self):
        """rids that the engine still has to end."""
        return [m.rid for m in self.wire.sent if isinstance(m, AddRequest) and m.rid in self.client._open]


def run(scenario):
    async def main():
        bench = Bench()
        carrying = asyncio.create_task(bench.client.run())
        try:
            await scenario(bench)
        finally:
            carrying.cancel()

    asyncio.run(main())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "tokens", "end", "error", "leave", "abort", "strange", "fail"]),
        st.integers(0, 7),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_every_request_ends_once(actions):
    async def scenario(bench):
        failed = False
        for action, number, flag in actions:
            open_rids = bench.unanswered()
            rid = open_rids[number % len(open_rids)] if open_rids else "none"
            if action == "submit":
                try:
                    bench.submit(1 + number % 3, flag, ("T",) if number == 7 else ())
                    assert not failed
                except (Overloaded, EngineFailed):
                    assert failed or bench.client.num_open + 1 + number % 3 > CAPACITY
            elif action == "leave" and bench.generations:
                bench.generations[number % len(bench.generations)].leave()
            elif action == "abort":
                bench.client.abort(f"r{number}")
            elif action == "fail" and number == 0:
                bench.client.fail("gone")
                failed = True
            else:
                finish = {"end": Finish("length"), "error": Finish("error", None, "broke")}.get(action)
                ids = [ord("T")] * (number % 3)
                output = RequestOutput(rid="nobody" if action == "strange" else rid, token_ids=ids, finish=finish)
                bench.wire.messages.put_nowait(StepOutput(outputs=[output]))
            await bench.settle()
        for rid in bench.unanswered():
            end = RequestOutput(rid=rid, finish=Finish("stop"))
            bench.wire.messages.put_nowait(StepOutput(outputs=[end]))
        await bench.settle()
        assert bench.client.num_open == 0
        assert all(finish is not None for finish in bench.finishes.values())
        for generation in bench.generations:
            assert generation.ended
            if not generation.client_gone:
                async with asyncio.timeout(1):
                    await generation.news()
        assert bench.metrics.requests == len(bench.finishes)
        assert not bench.client._by_public_rid

    run(scenario)


def test_a_place_is_free_when_the_engine_has_let_go_and_not_before():
    async def scenario(bench):
        generation = bench.submit(CAPACITY, False)
        generation.leave()
        await bench.settle()
        assert generation.ended
        with pytest.raises(Overloaded):
            bench.submit(1, False)
        aborts = [m.rid for m in bench.wire.sent if isinstance(m, AbortRequest)]
        assert len(aborts) == CAPACITY
        end = RequestOutput(rid=aborts[0], finish=Finish("abort"))
        bench.wire.messages.put_nowait(StepOutput(outputs=[end]))
        await bench.settle()
        bench.submit(1, False)
        with pytest.raises(InvalidRequest):
            bench.submit(CAPACITY + 1, False)

    run(scenario)


def test_waiters_sleep_until_there_is_news():
    async def scenario(bench):
        whole, streamed = bench.submit(1, False), bench.submit(1, True)
        tasks = [asyncio.create_task(g.news()) for g in (whole, streamed)]
        await bench.settle()
        outputs = [RequestOutput(rid=g.streams[0].engine_rid, token_ids=[ord("a")]) for g in (whole, streamed)]
        bench.wire.messages.put_nowait(StepOutput(outputs=outputs))
        await bench.settle()
        assert [task.done() for task in tasks] == [False, True]
        ends = [RequestOutput(rid=o.rid, token_ids=[ord("b")], finish=Finish("length")) for o in outputs]
        bench.wire.messages.put_nowait(StepOutput(outputs=ends))
        await bench.settle()
        assert tasks[0].done()
        assert whole.streams[0].take().text == "ab"
        assert [stream.take().text for stream in await streamed.news()] == ["ab"]

    run(scenario)


def test_what_cannot_be_carried_ends_the_carrying():
    async def scenario(bench):
        async def refuse(message):
            raise OverflowError("too big")

        bench.wire.send = refuse
        carrying = asyncio.create_task(bench.client.run())
        bench.submit(1, False)
        with pytest.raises(ExceptionGroup):
            await carrying

    async def main():
        await scenario(Bench())

    asyncio.run(main())
