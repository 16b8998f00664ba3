"""One start of the default model, and everything a newcomer does with it."""

from __future__ import annotations

import asyncio
import itertools

import httpx2 as httpx
import openai
from tests.end_to_end.conftest import alive, wait_until

from ziphius.config import DEFAULT_MODEL

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_newcomers_first_minutes(installation) -> None:
    server = installation.start()
    again = installation.run("start", "--port", str(server.port))
    assert "run" in again.stdout + again.stderr

    body = {"model": DEFAULT_MODEL, "messages": QUESTION}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == 37

    assert installation.run("status").stdout.startswith("default")
    assert DEFAULT_MODEL in installation.run("logs", "-n", "50").stdout
    pid = server.status()["pid"]
    installation.run("restart")
    assert server.status()["pid"] != pid
    tree = server.tree()
    installation.run("stop")
    assert not any(alive(process) for process in tree)
    assert installation.run("status", check=False).returncode == 3


class TestClients:
    """The real openai client against one server."""

    def test_all_of_it(self, installation) -> None:
        # One start for the whole class of checks: each costs seconds.
        server = installation.start("--max-running-requests", "8")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)
        self.greedy_answers_repeat(client)
        self.a_seed_repeats_in_any_company(client)
        self.streams_add_up(client)
        self.logprobs_and_stops(client)
        self.generate_is_cumulative(server)
        self.a_client_that_leaves_frees_its_pages(server)
        self.prefixes_are_cached(server, client)

    def greedy_answers_repeat(self, client: openai.OpenAI) -> None:
        texts = {
            client.chat.completions.create(model=DEFAULT_MODEL, messages=QUESTION, temperature=0)
            .choices[0]
            .message.content
            for _ in range(2)
        }
        assert texts == {"The capital of France is Paris."}

    def a_seed_repeats_in_any_company(self, client: openai.OpenAI) -> None:
        def ask(n: int) -> list[str]:
            answer = client.chat.completions.create(
                model=DEFAULT_MODEL, messages=QUESTION, temperature=1.0, top_p=0.9, seed=7, n=n, max_tokens=24
            )
            return [choice.message.content or "" for choice in answer.choices]

        alone, together = ask(1), ask(4)
        assert together[0] == alone[0]
        assert len(set(together)) > 1

    def streams_add_up(self, client: openai.OpenAI) -> None:
        stream = client.chat.completions.create(
            model=DEFAULT_MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "The capital of France is Paris."
        usage = chunks[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (37, 8)

    def logprobs_and_stops(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model=DEFAULT_MODEL, prompt="The capital of France is", temperature=0, max_tokens=16, logprobs=2, stop=["."]
        )
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason) == (" Paris", "stop")
        assert choice.logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        assert max(choice.logprobs.top_logprobs[0], key=choice.logprobs.top_logprobs[0].__getitem__) == " Paris"

    def generate_is_cumulative(self, server) -> None:
        body = {"text": "1 2 3 4", "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 6}}
        texts = []
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    texts.append(httpx.Response(200, content=line[6:]).json()["text"])
        assert len(texts) == 6
        assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(texts))

    def a_client_that_leaves_frees_its_pages(self, server) -> None:
        async def leave() -> None:
            body = {"model": DEFAULT_MODEL, "prompt": "Once", "max_tokens": 4000, "stream": True, "ignore_eos": True}
            async with (
                httpx.AsyncClient(timeout=60) as client,
                client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
            ):
                async for _ in response.aiter_lines():
                    return

        asyncio.run(leave())
        wait_until(lambda: server.live()["running"] == 0, "nothing is computed for nobody")

    def prefixes_are_cached(self, server, client: openai.OpenAI) -> None:
        prompt = "All work and no play makes Jack a dull boy. " * 12
        cached = []
        for _ in range(2):
            answer = client.completions.create(model=DEFAULT_MODEL, prompt=prompt, max_tokens=2, temperature=0)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        assert cached[0] == 0 < cached[1]
        assert httpx.post(f"{server.url}/flush_cache", timeout=60).status_code == 200
